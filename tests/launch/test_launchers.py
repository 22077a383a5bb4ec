"""Every launcher script starts ranks that find one another, on one host and on two of two ranks."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.emulate_hosts import EmulatedHosts, emulated_hosts
from tests.launching import ROOT, environment
from tests.needs import needs_horovod, needs_namespaces
from tests.ranks.launched import digest
from tests.threads import run_ranks

LAUNCH, SCRIPT = ROOT / "launch", ROOT / "tests/ranks/launched.py"
# What Slurm would do: start $TASKS tasks on each node, and tell them where they stand.
STUBS = {
    "srun": """#!/bin/sh
while :; do case $1 in --*) shift ;; *) break ;; esac; done
node=0 rank=0 pids= code=0
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
for host in $nodes; do
    for local in $(seq 0 $((TASKS - 1))); do
        place="SLURM_PROCID=$rank SLURM_LOCALID=$local SLURM_NODEID=$node"
        on "$host" env $place SLURM_NTASKS=$(($(echo $nodes | wc -w) * TASKS)) \\
            SLURM_STEP_TASKS_PER_NODE=$TASKS,$TASKS "$@" &
        pids="$pids $!" rank=$((rank + 1))
    done
    node=$((node + 1))
done
for pid in $pids; do wait "$pid" || code=$?; done
exit $code
""",
    "scontrol": """#!/bin/sh
[ "$1 $2" = "show hostnames" ] && echo "$3" | tr , '\\n'
""",
    "on": """#!/bin/sh
[ -z "${PRTE_MCA_plm_ssh_agent:-}" ] || exec "$PRTE_MCA_plm_ssh_agent" "$@"
shift
exec "$@"
""",
    "ssh": """#!/bin/sh
host=
while :; do
    case $1 in -o) shift 2 ;; *) [ -z "$host" ] || break; host=$1; shift ;; esac
done
exec on "$host" "$@"
""",
}


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[EmulatedHosts]:
    with emulated_hosts(2, rate="1gbit") as hosts:
        yield hosts


def places(stdout: str) -> dict[str, str]:
    """Each rank's place, and its digest."""
    return dict(re.findall(r"(rank \d+ of .*), has (\w+)", stdout))


def wanted(hosts: int) -> dict[str, str]:
    """Two ranks a host, all with the model that ranks in threads get."""
    size = 2 * hosts
    found = run_ranks(size, digest)[0]
    return {f"rank {r} of {size}, {r % 2} of 2 here": found for r in range(size)}


ONE_HOST = {
    "mpirun": "mpirun.sh 2 {script}",
    "torchrun": "torchrun.sh 2 {script}",
    "horovodrun": "horovodrun.sh 2 {script} horovod",
    "slurm": "slurm.sbatch {script}",
}
TWO_HOSTS = {
    "mpirun": ("head", "mpirun.sh 4 {script}"),
    "torchrun": ("each", "torchrun.sh 2 {script}"),
    "horovodrun": ("head", "horovodrun.sh 4 {script} horovod"),
    "slurm": ("head", "slurm.sbatch {script}"),
}
LAUNCHERS = [
    "mpirun",
    "torchrun",
    "slurm",
    pytest.param("horovodrun", marks=needs_horovod),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_on_one_host(launcher: str, stubs: Path) -> None:
    port = str(20000 + os.getpid() % 10000)  # none that the system gives to somebody meanwhile
    env = environment(PYTHON=sys.executable, MASTER_PORT=port, TASKS="2")
    env |= {"PATH": f"{stubs}:{env['PATH']}", "SLURM_JOB_NODELIST": "localhost"}
    done = subprocess.run(
        ["bash", "-c", f"bash {LAUNCH}/{ONE_HOST[launcher].format(script=SCRIPT)}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert places(done.stdout) == wanted(1)


@needs_namespaces
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_on_two_hosts_of_two_ranks(launcher: str, two_hosts: EmulatedHosts, stubs: Path) -> None:
    mode, command = TWO_HOSTS[launcher]
    variables = {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{stubs}:$PATH",
        "HOSTS": "2" if mode == "each" else ",".join(f"{host}:2" for host in two_hosts.hosts),
        "HOST_INDEX": "$NODE_RANK",
        "HOROVODRUN_FLAGS": '"--gloo --network-interfaces eth0"',
        "SLURM_JOB_NODELIST": ",".join(two_hosts.hosts),
        "TASKS": "2",
    }
    if launcher == "slurm":
        variables["MASTER_ADDR"] = ""  # it finds the first node by itself
    export = " ".join(f"{name}={value}" for name, value in variables.items())
    script = f"export {export}; exec bash {LAUNCH}/{command.format(script=SCRIPT)}"
    done = two_hosts.run(["sh", "-c", script], mode, ranks_per_host=2, timeout=150, grace=20)
    assert done.returncode == 0, done.stdout
    assert places(done.stdout) == wanted(2)
