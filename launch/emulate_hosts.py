#!/usr/bin/env python3
"""Several hosts on one machine: network namespaces whose links have a real, limited rate.

    emulate_hosts.py up --hosts 4 --rate 1gbit
    emulate_hosts.py run -- python train.py                             one process a rank
    emulate_hosts.py run --mpi --ranks-per-host 2 -- python train.py    under mpirun
    emulate_hosts.py run --each -- torchrun train.py                    under torchrun itself
    emulate_hosts.py run --head -- launch/mpirun.sh -np 4 train.py      from the first host
    emulate_hosts.py link 2 down                                        pull the cable of host 2
    emulate_hosts.py down

Each host has its own name, address and interface, and a cable to one switch; a token bucket at
each end of the cable holds it to the rate, each way. Ranks of one host reach one another at memory
speed. All else is shared. Needs root and iproute2.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

MODES = {
    "torchrun": "one process a rank, with the variables that torchrun sets (default)",
    "mpi": "mpirun, from the first host, on all of them",
    "each": "the command once on each host, with the variables that torchrun itself reads",
    "head": "the command once, on the first host; an mpirun inside finds the others",
}
_RECORDS = Path("/run/emulated_hosts")
_TAG = "EMULATED_HOSTS"  # in the environment of every process of a job
_QUEUE, _NOTHING = "100ms", subprocess.DEVNULL
# What a bucket lets through unshaped after a pause: 1 ms of the rate, two packets at least. With
# less, Linux cuts its 64 KB segments into packets one by one, and 1 Gbit/s takes a whole processor.
_BURST_SECONDS, _LEAST_BURST_BYTES, _UNITS = 1e-3, 3200, {"k": 1e3, "m": 1e6, "g": 1e9}
_WITH_NAME = ("unshare", "--uts", "sh", "-c", 'echo "$0" >/proc/sys/kernel/hostname; exec "$@"')
# mpirun's remote shell, called as: agent [options] HOST COMMAND...
_AGENT = f"""#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
H=$1; shift
exec ip netns exec "$H" {shlex.join(_WITH_NAME)} "$H" sh -c "$*"
"""


class EmulationError(Exception):
    """The machine or the options do not allow it; says what to do."""


def _call(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"{command}: {(done.stderr or done.stdout).strip()}")


def why_not(latency: str | None = None) -> str | None:
    """Why hosts cannot be emulated on this machine; None if they can."""
    if os.geteuid() != 0:
        return "emulated hosts need root, to make network namespaces: try sudo"
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux")):
        if not shutil.which(tool):
            return f"emulated hosts need `{tool}`: apt-get install {package}"
    probe = f"emu-probe-{os.getpid()}"
    try:
        _call(f"ip netns add {probe}")
        if latency:
            _call(f"tc -n {probe} qdisc add dev lo root netem delay {latency}")
    except EmulationError as error:
        kernel = "no netem qdisc to delay packets with: leave --latency out"
        return f"this kernel has {kernel if 'netem' in str(error) else 'no namespaces'} [{error}]"
    finally:
        subprocess.run(["ip", "netns", "del", probe], stderr=_NOTHING)
    return None


def shaping(rate: str, latency: str | None = None) -> list[str]:
    """The arguments of `tc qdisc add dev DEV` that give one end of a cable its rate and delay."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    if rate != "none" and not (match and float(match[1])):
        raise EmulationError(f"rate is {rate!r}: give one such as 100mbit or 1gbit, or none")
    delay = [f"root handle 1: netem delay {latency} limit 100000"] if latency else []
    if not match:
        return delay
    place = "parent 1:1 handle 10:" if latency else "root handle 1:"
    burst = int(float(match[1]) * _UNITS[match[2]] / 8 * _BURST_SECONDS)
    bucket = f"burst {max(_LEAST_BURST_BYTES, burst)} latency {_QUEUE}"
    return [*delay, f"{place} tbf rate {rate} {bucket}"]


class EmulatedHosts:
    """A running network, made by `up` and found again by `find`."""

    def __init__(self, name: str, count: int, rate: str, latency: str | None, owner: int) -> None:
        self.name, self.count, self.rate, self.latency = name, count, rate, latency
        self.owner = owner  # the process it goes down with; 0 for none
        self.hosts = [f"{name}-{i}" for i in range(count)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        self.switch, self.folder = f"{name}-switch", _RECORDS / name

    @classmethod
    def up(
        cls, name: str, count: int, rate: str, latency: str | None = None, owner: int = 0
    ) -> "EmulatedHosts":
        """Make the hosts. A network of the same name, and any whose owner is dead, goes first."""
        if not re.fullmatch(r"[a-z][a-z0-9]{0,30}", name) or not 1 <= count <= 200:
            raise EmulationError(f"{count} hosts named {name!r}: give 1 to 200, and a plain name")
        shaping(rate, latency)
        if reason := why_not(latency):
            raise EmulationError(reason)
        for old in cls.all():
            if old.name == name or (old.owner and not Path(f"/proc/{old.owner}").exists()):
                old.down()
        net = cls(name, count, rate, latency, owner)
        try:
            net._build()
        except BaseException:
            net.down()
            raise
        return net

    @classmethod
    def find(cls, name: str = "emu") -> "EmulatedHosts":
        """The network that `up` made under this name."""
        record = _RECORDS / name / "record.json"
        if not record.exists():
            raise EmulationError(f"no emulated hosts named {name!r} are up: `up` first")
        return cls(**json.loads(record.read_text()))

    @classmethod
    def all(cls) -> list["EmulatedHosts"]:
        return [cls.find(record.parent.name) for record in sorted(_RECORDS.glob("*/record.json"))]

    def _build(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {k: getattr(self, k) for k in ("name", "count", "rate", "latency", "owner")}
        (self.folder / "record.json").write_text(json.dumps(record))
        (self.folder / "agent").write_text(_AGENT)
        (self.folder / "agent").chmod(0o755)
        _call(f"ip netns add {self.switch}")
        _call(f"ip -n {self.switch} link add br0 type bridge")
        _call(f"ip -n {self.switch} link set br0 up")
        for host in range(self.count):
            self._plug_in(host)

    def _plug_in(self, host: int) -> None:
        name, port = self.hosts[host], f"h{host}"
        etc = Path("/etc/netns", name)  # `ip netns exec` lays it over /etc
        etc.mkdir(parents=True, exist_ok=True)
        names = [f"{a} {h}\n" for a, h in zip(self.addresses, self.hosts, strict=True)]
        (etc / "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))
        (etc / "nsswitch.conf").write_text("hosts: files\n")  # no name server is in reach
        _call(f"ip netns add {name}")
        _call(f"ip link add eth0 netns {name} type veth peer name {port} netns {self.switch}")
        _call(f"ip -n {name} addr add {self.addresses[host]}/24 dev eth0")
        _call(f"ip -n {self.switch} link set {port} master br0")
        for namespace, device, latency in ((name, "eth0", self.latency), (self.switch, port, None)):
            for arguments in shaping(self.rate, latency):
                _call(f"tc -n {namespace} qdisc add dev {device} {arguments}")
            _call(f"ip -n {namespace} link set {device} up")
        _call(f"ip -n {name} link set lo up")

    def down(self) -> None:
        """End every process in the network, and leave no trace of it; twice does no harm."""
        self.stop(everything=True)
        for namespace in [*self.hosts, self.switch]:
            if Path("/run/netns", namespace).exists():
                _call(f"ip netns del {namespace}")
            shutil.rmtree(Path("/etc/netns", namespace), ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def link(self, host: int, up: bool) -> None:
        """Pull the cable of a host, or put it back."""
        _call(f"ip -n {self.switch} link set h{host} {'up' if up else 'down'}")

    def stop(self, everything: bool = False) -> None:
        """End the job that runs, or every process that anyone started in the network."""
        for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
            deadline, told = time.monotonic() + seconds, set[int]()
            while (pids := self._processes(everything)) and time.monotonic() < deadline:
                for pid in pids - told:  # mpirun takes a second signal for impatience
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                told |= pids
                time.sleep(0.05)

    def _processes(self, everything: bool) -> set[int]:
        namespaces = [Path("/run/netns", name) for name in self.hosts]
        networks = {path.stat().st_ino for path in namespaces if path.exists()}
        found, tag = set(), f"{_TAG}={self.name}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if (entry / "ns/net").stat().st_ino in networks and (
                    everything or tag in (entry / "environ").read_bytes().split(b"\0")
                ):
                    found.add(int(entry.name))
        return found

    def run(
        self,
        command: Sequence[str],
        mode: str = "torchrun",
        *,
        ranks_per_host: int = 1,
        timeout: float = math.inf,
        grace: float = 5.0,
        capture: bool = True,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a job, and end all of it before returning, whatever happens.

        Args:
            mode: how it is started, see `MODES`.
            timeout: seconds until the job is ended; the return code is then 124.
            grace: seconds the other processes of a job have after one has failed.
            capture: return what all ranks printed, to stdout and stderr, as `stdout`.
        """
        if mode not in MODES or ranks_per_host < 1:
            raise EmulationError(f"{mode=} with {ranks_per_host=}: modes are {', '.join(MODES)}")
        processes: list[subprocess.Popen[str]] = []
        with self._turn(), tempfile.TemporaryFile("w+", errors="replace") as output:
            out = output if capture else None
            base = os.environ | self._variables(ranks_per_host)
            try:
                for host, args, more in _plan(command, mode, self.hosts, ranks_per_host):
                    whole = ["ip", "netns", "exec", host, *_WITH_NAME, host, *args]
                    start = partial(subprocess.Popen, env={**base, **more}, stdin=_NOTHING)
                    processes.append(start(whole, stdout=out, stderr=out))
                code = _outcome(processes, timeout, grace)
            finally:
                self.stop()
                for process in processes:
                    process.kill()
                    process.wait()
            output.seek(0)
            return subprocess.CompletedProcess(list(command), code, output.read())

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:  # one job at a time, as they share the links
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EmulationError(f"a job is running on {self.name}: wait, or `stop`") from None
            self.stop()
            with _guard("stop", self.name):
                yield

    def _variables(self, ranks: int) -> dict[str, str]:
        hostfile = self.folder / "hostfile"
        hostfile.write_text("".join(f"{host} slots={ranks}\n" for host in self.hosts))
        found = {"MASTER_ADDR": self.addresses[0], "MASTER_PORT": "29500"}
        found |= {f"PET_{name}": value for name, value in found.items()}
        found |= {"PET_NNODES": str(self.count), "PET_NPROC_PER_NODE": str(ranks)}
        found |= {_TAG: self.name, "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
        root = ("ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM")
        found |= {f"{tool}_{name}": "1" for tool in ("PRTE", "OMPI") for name in root}
        found["PRTE_MCA_plm_ssh_agent"] = str(self.folder / "agent")
        found["PRTE_MCA_prte_default_hostfile"] = str(hostfile)
        found["PRTE_MCA_hwloc_default_binding_policy"] = "none"  # the hosts share the processors
        found |= {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_pml": "ob1"}
        if sys.prefix != sys.base_prefix:  # a virtual environment, activated or not
            found["PATH"] = f"{sys.prefix}/bin:{os.environ.get('PATH', os.defpath)}"
        return found


def _plan(
    command: Sequence[str], mode: str, hosts: Sequence[str], ranks: int
) -> Iterator[tuple[str, Sequence[str], dict[str, str]]]:
    """Host, command and further variables of each process to start."""
    size = str(len(hosts) * ranks)
    if mode in ("head", "mpi"):
        yield hosts[0], [*(("mpirun", "-np", size) if mode == "mpi" else ()), *command], {}
        return
    for index, host in enumerate(hosts):
        node = {name: str(index) for name in ("NODE_RANK", "GROUP_RANK", "PET_NODE_RANK")}
        if mode == "each":
            yield host, command, node
            continue
        node |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": str(ranks)}
        for local in range(ranks):
            rank = {"RANK": str(index * ranks + local), "LOCAL_RANK": str(local)}
            yield host, command, node | rank


def _outcome(processes: Sequence["subprocess.Popen[str]"], limit: float, grace: float) -> int:
    """Wait for all; the first failure's return code, else 124 for too late, else 0."""
    deadline, code = time.monotonic() + limit, 0
    while True:
        codes = [process.poll() for process in processes]
        if not code and (code := next(filter(None, codes), 0)):
            deadline = min(deadline, time.monotonic() + grace)
        if None not in codes:
            return code
        if time.monotonic() > deadline:
            return code or 124
        time.sleep(0.02)


@contextlib.contextmanager
def _guard(action: str, name: str) -> Iterator[None]:
    """Should this process be killed meanwhile, another does the cleaning: its pipe closes then."""
    script = 'cat >/dev/null; exec "$@" 2>/dev/null'
    this = (sys.executable, str(Path(__file__).resolve()), action, "--name", name)
    command = ["sh", "-c", script, "sh", *this]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.communicate()


@contextlib.contextmanager
def emulated_hosts(
    count: int, rate: str = "1gbit", latency: str | None = None, *, name: str = ""
) -> Iterator[EmulatedHosts]:
    """Hosts for a `with` block, gone after it or when this process dies, however it dies."""
    name = name or f"emu{os.getpid()}x{os.urandom(2).hex()}"
    with _guard("down", name), contextlib.ExitStack() as stack:
        hosts = EmulatedHosts.up(name, count, rate, latency, os.getpid())
        stack.callback(hosts.down)
        yield hosts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text)
        made.add_argument("--name", default="emu", help="which network (default: emu)")
        return made

    up = action("up", "make the hosts, in place of any of the same name")
    up.add_argument("--hosts", type=int, default=4, help="how many (default: 4)")
    up.add_argument("--rate", default="1gbit", help="100mbit, 1gbit, ... or none (default: 1gbit)")
    up.add_argument("--latency", help="one way, such as 1ms; only where the kernel has netem")
    action("down", "end all that runs on the hosts, and remove them")
    action("status", "the networks that are up")
    action("stop", "end the job that runs")
    link = action("link", "pull the cable of a host, or put it back")
    link.add_argument("host", type=int, help="0 is the first")
    link.add_argument("state", choices=("up", "down"))
    run = action("run", "run a job, and end all of it on Ctrl-C, on a failure, on being killed")
    modes = run.add_mutually_exclusive_group()
    run.set_defaults(mode="torchrun")
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=text)
    run.add_argument("--ranks-per-host", type=int, default=1, metavar="R", help="default: 1")
    run.add_argument("--timeout", type=float, default=math.inf, help="in seconds")
    run.add_argument("--grace", type=float, default=5.0, help="seconds for the rest once one fails")
    run.add_argument("command", nargs="+", metavar="-- COMMAND", help="program and arguments")
    return parser


def main() -> int:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if os.geteuid() != 0:
            raise EmulationError(why_not())
        code = _act(options)
    except EmulationError as error:
        print(f"emulate_hosts: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code if code >= 0 else 128 - code


def _act(options: argparse.Namespace) -> int:
    if options.action == "status":
        for net in EmulatedHosts.all():
            print(f"{net.name}: {net.count} hosts, {net.rate}, added latency {net.latency}")
        return 0
    if options.action == "up":
        EmulatedHosts.up(options.name, options.hosts, options.rate, options.latency)
        return 0
    net = EmulatedHosts.find(options.name)
    if options.action == "run":
        chosen = {k: getattr(options, k) for k in ("mode", "ranks_per_host", "timeout", "grace")}
        return net.run(options.command, capture=False, **chosen).returncode
    link = (options.host, options.state == "up") if options.action == "link" else ()
    getattr(net, options.action)(*link)
    return 0


if __name__ == "__main__":
    sys.exit(main())
