"""The house: who may import whom, what importing costs, how the top level looks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment

ROOMS = ("dgc", "launch", "tests", "benchmarks")
FORBIDDEN = {
    "core": {"train", "comm", "model", "config", "cli", "horovod", "integrations"},
    "comm": {"train", "model", "config", "cli"},
    "model": {"train", "comm", "config", "cli"},
    "train": {"model", "cli"},
}


def imports(path: Path) -> set[str]:
    """The rooms of the package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "dgc":
            names = [f"dgc.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("dgc.")}
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_arrows(room: str) -> None:
    for path in (ROOT / "dgc" / room).rglob("*.py"):
        assert not imports(path) & FORBIDDEN[room], f"{path} imports {imports(path)}"


def test_libraries_stay_in_their_rooms() -> None:
    for path in (ROOT / "dgc").rglob("*.py"):
        words = path.read_text()
        if "kernels" not in path.parts:
            assert "import numba" not in words, path
            assert "import triton" not in words, path


def test_importing_is_inert() -> None:
    heavy = [
        "numba",
        "triton",
        "mpi4py",
        "horovod",
        "matplotlib",
        "tqdm",
        "constriction",
        "accelerate",
        "transformers",
        "pytorch_lightning",
    ]
    code = (
        "import sys, torch; before = set(sys.modules); import dgc, dgc.integrations; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before], torch.cuda.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.strip() == "[] False"


def test_top_level() -> None:
    allowed = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"}
    allowed |= {*ROOMS, "docs"}
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    top = {line.split("/")[0] for line in listed}
    assert not {name for name in top if not name.startswith(".")} - allowed


def test_files_stay_short() -> None:
    for path in (each for room in ROOMS for each in (ROOT / room).rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 400, f"{path}: is a seam missing?"
