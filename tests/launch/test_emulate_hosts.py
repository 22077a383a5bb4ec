"""Emulated hosts: jobs run on them as on real ones, at the rate, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.emulate_hosts import EmulatedHosts, EmulationError, emulated_hosts, shaping, why_not
from tests.needs import needs_namespaces

TOOL = [sys.executable, str(Path(__file__).parents[2] / "launch/emulate_hosts.py")]

# Each rank adds 1 over gloo, and says who and where it is.
GLOO = r"""
import os, socket, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
x = torch.ones(1000)
dist.all_reduce(x)
place = f"rank {dist.get_rank()} local {os.environ['LOCAL_RANK']} on {socket.gethostname()}"
os.write(1, f"sum {int(x[-1])} {place}\n".encode())  # one write: ranks share the pipe
dist.destroy_process_group()
"""
MPI = r"""
import numpy, os
from mpi4py import MPI
x = numpy.ones(100_000, numpy.float32)
y = numpy.empty_like(x)
MPI.COMM_WORLD.Allreduce(x, y)
local = os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]
place = f"rank {MPI.COMM_WORLD.rank} local {local} on {MPI.Get_processor_name()}"
os.write(1, f"sum {int(y[-1])} {place}\n".encode())
"""
# Rank 0 takes 12 MB from rank 1 and says how long it took.
STREAM = """
import os, socket, time
if os.environ["RANK"] == "0":
    peer, _ = socket.create_server((os.environ["MASTER_ADDR"], 7000)).accept()
    left, start = 12_000_000, time.perf_counter()
    while left:
        left -= len(peer.recv(1 << 20))
    print("seconds", time.perf_counter() - start, flush=True)
else:
    while True:
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 7000))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    peer.sendall(bytes(12_000_000))
"""


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[EmulatedHosts]:
    with emulated_hosts(2, rate="100mbit") as hosts:
        yield hosts


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def everywhere(hosts: EmulatedHosts, total: int) -> set[str]:
    return {
        f"sum {total} rank {2 * h + local} local {local} on {name}"
        for h, name in enumerate(hosts.hosts)
        for local in (0, 1)
    }


def said(stdout: str) -> set[str]:
    return {line for line in stdout.splitlines() if line.startswith("sum")}


@needs_namespaces
@pytest.mark.parametrize(("mode", "code"), [("torchrun", GLOO), ("mpi", MPI)])
def test_two_hosts_of_two_ranks(two_hosts: EmulatedHosts, mode: str, code: str) -> None:
    done = two_hosts.run(python(code), mode, ranks_per_host=2, timeout=90)
    assert done.returncode == 0, done.stdout
    assert said(done.stdout) == everywhere(two_hosts, 4)


@needs_namespaces
def test_torchrun_finds_its_variables(two_hosts: EmulatedHosts, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(GLOO)
    command = ["torchrun", "--log-dir", str(tmp_path), str(script)]
    done = two_hosts.run(command, "each", ranks_per_host=2, timeout=150, grace=20)
    assert done.returncode == 0, done.stdout
    assert said(done.stdout) == everywhere(two_hosts, 4)


@needs_namespaces
def test_the_link_has_its_rate(two_hosts: EmulatedHosts) -> None:
    done = two_hosts.run(python(STREAM), timeout=30)
    assert done.returncode == 0, done.stdout
    seconds = float(done.stdout.split()[-1])
    assert 0.9 < seconds < 4.5  # 0.96 s at 100 Mbit/s; 0.006 s unshaped


@needs_namespaces
def test_one_failure_ends_the_job(two_hosts: EmulatedHosts) -> None:
    script = 'echo here; [ "$RANK" = 0 ] || exit 3; exec sleep 100'
    done = two_hosts.run(["sh", "-c", script], grace=0.1, timeout=30)
    assert (done.returncode, done.stdout) == (3, "here\nhere\n")
    assert two_hosts._processes(everything=True) == set()


@needs_namespaces
def test_a_job_too_long_is_ended(two_hosts: EmulatedHosts) -> None:
    assert two_hosts.run(["sleep", "100"], "mpi", timeout=1.5).returncode == 124
    assert two_hosts._processes(everything=True) == set()


@needs_namespaces
def test_a_cable_is_pulled_and_put_back(two_hosts: EmulatedHosts) -> None:
    # Nothing listens there: a host in reach refuses at once, one that is cut off says nothing.
    code = "import socket; socket.create_connection(({!r}, 9), timeout={})"
    two_hosts.link(1, up=False)
    found = two_hosts.run(python(code.format(two_hosts.hosts[1], 1)), "head")
    assert "refused" not in found.stdout
    two_hosts.link(1, up=True)
    found = two_hosts.run(python(code.format(two_hosts.hosts[1], 10)), "head")
    assert "refused" in found.stdout


def wait_for(what: str, seen: bool) -> None:
    deadline = time.monotonic() + 15
    while Path(what).exists() != seen:
        assert time.monotonic() < deadline, f"{what} {'is not there' if seen else 'is still there'}"
        time.sleep(0.05)


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_job_whose_launcher_is_killed(
    two_hosts: EmulatedHosts, number: int, tmp_path: Path
) -> None:
    script = f"echo $$ > {tmp_path}/pid.part; mv {tmp_path}/pid.part {tmp_path}/pid; sleep 100"
    run = [*TOOL, "run", "--head", "--name", two_hosts.name, "--", "sh", "-c", script]
    # A shell without job control has what it starts in the background ignore SIGINT.
    launcher = subprocess.Popen(["env", "--default-signal=INT", *run])
    wait_for(f"{tmp_path}/pid", seen=True)
    pid = (tmp_path / "pid").read_text().strip()
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) != 0
    wait_for(f"/proc/{pid}", seen=False)


@needs_namespaces
def test_hosts_go_with_their_owner() -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(TOOL[1]).parent)!r})
from emulate_hosts import emulated_hosts
with emulated_hosts(1) as hosts:
    print(hosts.switch, flush=True)
    time.sleep(100)
"""
    owner = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    switch = owner.stdout.readline().strip()
    assert Path("/run/netns", switch).exists()
    owner.kill()
    owner.communicate()
    wait_for(f"/run/netns/{switch}", seen=False)


@needs_namespaces
def test_leftovers_of_a_dead_owner_are_removed() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = EmulatedHosts.up("emuleft", 1, "none", owner=dead.pid)
    with emulated_hosts(1, "none"):
        assert left.name not in {net.name for net in EmulatedHosts.all()}
    assert not Path("/run/netns", left.switch).exists()


@needs_namespaces
def test_one_job_at_a_time(two_hosts: EmulatedHosts) -> None:
    with two_hosts._turn(), pytest.raises(EmulationError, match="a job is running"):
        two_hosts.run(["true"])


@needs_namespaces
def test_latency_is_real_or_refused() -> None:
    if why_not("1ms") is None:
        with emulated_hosts(2, "none", "20ms") as hosts:
            code = "import socket; socket.create_connection(('{}', 9), timeout=5)"
            start = time.monotonic()
            hosts.run(python(code.format(hosts.hosts[1])), "head")
            assert time.monotonic() - start > 0.04
    else:
        with (
            pytest.raises(EmulationError, match="leave --latency out"),
            emulated_hosts(2, "none", "1ms"),
        ):
            pass
        assert os.getpid() not in {net.owner for net in EmulatedHosts.all() if net.latency}


@pytest.mark.parametrize("rate", ["1foo", "0gbit", "fast", "1 gbit"])
def test_rates_that_are_none_are_refused(rate: str) -> None:
    with pytest.raises(EmulationError, match="such as 100mbit"):
        shaping(rate)


def test_shaping() -> None:
    assert shaping("none") == []
    assert shaping("1gbit") == ["root handle 1: tbf rate 1gbit burst 125000 latency 100ms"]
    assert shaping("1mbit", "5ms") == [
        "root handle 1: netem delay 5ms limit 100000",
        "parent 1:1 handle 10: tbf rate 1mbit burst 3200 latency 100ms",
    ]


@needs_namespaces
@pytest.mark.parametrize("options", [["up", "--hosts", "0"], ["up", "--name", "a/b"], ["run", "x"]])
def test_mistakes_are_told(options: list[str]) -> None:
    name = [] if "--name" in options else ["--name", "emunone"]
    done = subprocess.run([*TOOL, *options, *name], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("emulate_hosts: ")
    assert "Traceback" not in done.stderr


def test_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root" in (why_not() or "")
    with pytest.raises(EmulationError, match="need root"):
        EmulatedHosts.up("emuroot", 2, "1gbit")
