"""Every command of the README is run, as it stands there."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launching import ROOT, environment

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SCRIPTS = {
    code.split("\n")[0].removeprefix("# "): code for kind, code in BLOCKS if kind == "python"
}
COMMANDS = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines()]
# This test is a part of what these two run.
RUNNING = {"make test", "make check"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would have put the scripts."""
    path: Path = tmp_path_factory.mktemp("reader")
    for name, code in SCRIPTS.items():
        (path / name).write_text(code)
    return path


def test_scripts_are_named() -> None:
    assert all(name.endswith(".py") for name in SCRIPTS)
    assert set(COMMANDS) > RUNNING


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
