"""The Horovod build script: what it says, without building."""

import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch/install_horovod.sh"


def script(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *options],
        env={**os.environ, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_help() -> None:
    done = script("--help")
    assert done.returncode == 0
    assert "HOROVOD_WHEELS" in done.stdout


def test_the_wheel_is_named_after_what_it_was_built_for(tmp_path: Path) -> None:
    done = script("--print-wheel", HOROVOD_WHEELS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    name = Path(done.stdout.strip())
    assert name.parent == tmp_path
    built, python = name.name.split("-")[1:3]
    assert built.startswith(f"0.28.1+torch{version('torch').replace('+', '.')}.openmpi")
    assert python == f"cp{sys.version_info[0]}{sys.version_info[1]}"


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    done = script(str(tmp_path / "empty"), PATH="/usr/bin:/bin", HOROVOD_WHEELS=str(tmp_path))
    assert done.returncode == 1
    assert "pip install torch" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_mistakes_are_told(tmp_path: Path) -> None:
    assert "unknown option: --nope" in script("--nope").stderr
    assert "no interpreter at" in script(str(tmp_path)).stderr
