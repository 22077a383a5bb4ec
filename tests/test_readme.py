"""Every command of the README is run, as it stands there."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launching import ROOT, environment

README = (ROOT / "README.md").read_text()


def blocks(kind: str, text: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# A framework's section runs an example and shows a few lines of it; other Python is whole scripts.
EXAMPLES = {
    example[0]: "".join(blocks("python", section))
    for section in README.split("\n## ")
    if (example := re.search(r"launch/examples/\w+\.py", "".join(blocks("bash", section))))
}
SCRIPTS = {
    code.split("\n")[0].removeprefix("# "): code
    for code in blocks("python", README)
    if code not in EXAMPLES.values()
}
COMMANDS = [line for code in blocks("bash", README) for line in code.splitlines()]
# This test is a part of what these two run.
RUNNING = {"make test", "make check"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would have put the scripts, with the repository's launch/."""
    path: Path = tmp_path_factory.mktemp("reader")
    (path / "launch").symlink_to(ROOT / "launch")
    for name, code in SCRIPTS.items():
        (path / name).write_text(code)
    return path


def test_scripts_are_named() -> None:
    assert all(name.endswith(".py") for name in SCRIPTS)
    assert set(COMMANDS) > RUNNING


def test_every_example_has_a_section() -> None:
    files = (ROOT / "launch" / "examples").glob("*.py")
    assert set(EXAMPLES) == {f"launch/examples/{path.name}" for path in files}


@pytest.mark.parametrize("path", EXAMPLES)
def test_section_shows_its_example(path: str) -> None:
    shown = EXAMPLES[path]
    assert 0 < len(shown.splitlines()) <= 5
    rest = "\n" + (ROOT / path).read_text()
    for part in shown.split("\n\n"):  # an empty line stands for what is left out
        _, found, rest = rest.partition("\n" + part.strip("\n") + "\n")
        assert found, f"{path} lacks, in this order:\n{part}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in RUNNING])
def test_command(command: str, folder: Path) -> None:
    if "horovod" in command and find_spec("horovod") is None:
        pytest.skip("Horovod is not installed: make horovod")
    is_make = command.startswith("make ")
    small = {"RANKS": "2", "EPOCHS": "1", "RETRAIN_EPOCHS": "0.1", "OUT": str(folder / "out")}
    small["PET_LOG_DIR"] = str(folder / "logs")  # torchrun would leave a folder of its own behind
    env = environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", **small)
    if not is_make:
        env["PRTE_ALLOW_RUN_AS_ROOT"] = env["PRTE_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    assert shutil.which(command.split()[0], path=env["PATH"]), f"{command} is not installed"
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT if is_make else folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if is_make:
        for name in ("report.png", "report.jsonl", "dgc/model.dgc"):
            assert (folder / "out" / name).stat().st_size > 0
