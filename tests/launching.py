"""Start real ranks for a test: a script of tests/ranks under mpirun or torchrun."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
# A launcher's variables of an outer job would be taken for this one's.
_FOREIGN = ("OMPI_", "PMIX_", "PRTE_", "RANK", "WORLD_SIZE", "LOCAL_", "SLURM_", "MASTER_")


def environment(**extra: str) -> dict[str, str]:
    """A clean one: one thread a rank, the package importable, mpirun of this interpreter first."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    scripts = str(Path(sys.executable).parent)
    path = f"{scripts}{os.pathsep}{env.get('PATH', '')}"
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, **extra}


def mpirun(
    ranks: int, script: str, *args: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    return _run([*_MPIRUN, "-np", str(ranks), sys.executable, script, *args], timeout, ROOT)


def torchrun(
    ranks: int, script: str, *args: str, timeout: float = 120, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as logs:  # torchrun would leave its own behind
        command += ["--log-dir", logs, "--nproc-per-node", str(ranks)]
        return _run([*command, script, *args], timeout, cwd)


def _run(command: list[str], timeout: float, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
