#!/usr/bin/env python3
"""Several hosts on one machine: network namespaces whose links have a real, limited rate.

    emulate_hosts.py up --hosts 4 --rate 1gbit
    emulate_hosts.py run -- python train.py                         one process a rank
    emulate_hosts.py run --mpi --ranks-per-host 2 -- python train.py      under mpirun
    emulate_hosts.py run --each -- torchrun train.py                      under torchrun itself
    emulate_hosts.py run --head -- launch/mpirun.sh -np 4 train.py        from the first host
    emulate_hosts.py link 2 down                                    pull the cable of host 2
    emulate_hosts.py down

Each host has its own name, address and interface, and a cable to one switch; a token bucket at
each end of the cable holds it to the rate, each way. Ranks of one host reach one another at memory
speed. Processors, memory, files and processes are the machine's and are shared. Needs root and
iproute2.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

MODES = ("ranks", "each", "head", "mpi")
_RECORDS = Path("/run/emulated_hosts")
_SUBNET = "10.77.0"
_TAG = "EMULATED_HOSTS"  # in the environment of every process of a job
_QUEUE = "100ms"
# What a bucket lets through at once after a pause: 1 ms of the rate, and two packets at least.
_BURST_SECONDS, _LEAST_BURST_BYTES = 1e-3, 3200
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_WITH_NAME = ("unshare", "--uts", "sh", "-c", 'echo "$0" >/proc/sys/kernel/hostname; exec "$@"')
# mpirun's remote shell, called as: agent [options] HOST COMMAND...
_AGENT = f"""#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
H=$1; shift
exec ip netns exec "$H" {shlex.join(_WITH_NAME)} "$H" sh -c "$*"
"""


class EmulationError(Exception):
    """The machine or the options do not allow it; the message says what to do."""


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"{shlex.join(command)}: {(done.stderr or done.stdout).strip()}")


def why_not() -> str | None:
    """Why hosts cannot be emulated on this machine; None if they can."""
    if os.geteuid() != 0:
        return "emulated hosts need root, to make network namespaces: run with sudo"
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux")):
        if not shutil.which(tool):
            return f"emulated hosts need `{tool}`: apt-get install {package}"
    probe = f"emu-probe-{os.getpid()}"
    try:
        _call("ip", "netns", "add", probe)
        _call("ip", "netns", "del", probe)
    except EmulationError as error:
        return f"network namespaces are not permitted here [{error}]"
    return None


def shaping(rate: str, latency: str | None = None) -> list[list[str]]:
    """The arguments of `tc qdisc add dev DEV` that give one end of a cable its rate and delay."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    if rate != "none" and not (match and float(match[1])):
        raise EmulationError(f"rate is {rate!r}: give one such as 100mbit or 1gbit, or none")
    commands, place = [], ["root", "handle", "1:"]
    if latency:
        commands.append([*place, "netem", "delay", latency, "limit", "100000"])
        place = ["parent", "1:1", "handle", "10:"]
    if match:
        burst = float(match[1]) * _UNITS[match[2]] / 8 * _BURST_SECONDS
        sizes = ["burst", str(max(_LEAST_BURST_BYTES, int(burst))), "latency", _QUEUE]
        commands.append([*place, "tbf", "rate", rate, *sizes])
    return commands


class EmulatedHosts:
    """A running network, made by `up` and found again by `find`."""

    def __init__(self, name: str, count: int, rate: str, latency: str | None, owner: int) -> None:
        self.name, self.count, self.rate, self.latency = name, count, rate, latency
        self.owner = owner  # the process it goes down with; 0 for none
        self.hosts = [f"{name}-{i}" for i in range(count)]
        self.addresses = [f"{_SUBNET}.{i + 1}" for i in range(count)]
        self.switch = f"{name}-switch"
        self.folder = _RECORDS / name

    @classmethod
    def up(
        cls,
        count: int,
        rate: str = "1gbit",
        latency: str | None = None,
        *,
        name: str = "emu",
        owner: int = 0,
    ) -> "EmulatedHosts":
        """Make the hosts. A network of the same name, and any whose owner is dead, goes first."""
        if not re.fullmatch(r"[a-z][a-z0-9]{0,30}", name) or not 1 <= count <= 200:
            raise EmulationError(
                f"{count} hosts named {name!r}: give 1 to 200 hosts, and a name of up to 31 "
                "lower-case letters and digits"
            )
        shaping(rate, latency)
        if reason := why_not():
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
        try:
            return cls(**json.loads((_RECORDS / name / "record.json").read_text()))
        except FileNotFoundError:
            raise EmulationError(f"no emulated hosts named {name!r} are up: `up` first") from None

    @classmethod
    def all(cls) -> list["EmulatedHosts"]:
        """The networks that are up."""
        return [cls.find(record.parent.name) for record in sorted(_RECORDS.glob("*/record.json"))]

    def _build(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {k: getattr(self, k) for k in ("name", "count", "rate", "latency", "owner")}
        (self.folder / "record.json").write_text(json.dumps(record))
        agent = self.folder / "agent"
        agent.write_text(_AGENT)
        agent.chmod(0o755)
        _call("ip", "netns", "add", self.switch)
        _call("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        _call("ip", "-n", self.switch, "link", "set", "br0", "up")
        for host in range(self.count):
            self._plug_in(host)

    def _plug_in(self, host: int) -> None:
        name, port = self.hosts[host], f"h{host}"
        etc = Path("/etc/netns") / name  # `ip netns exec` lays it over /etc
        etc.mkdir(parents=True, exist_ok=True)
        names = [f"{a} {h}\n" for a, h in zip(self.addresses, self.hosts, strict=True)]
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        _call("ip", "netns", "add", name)
        peer = ("type", "veth", "peer", "name", port, "netns", self.switch)
        _call("ip", "link", "add", "eth0", "netns", name, *peer)
        _call("ip", "-n", name, "addr", "add", f"{self.addresses[host]}/24", "dev", "eth0")
        _call("ip", "-n", self.switch, "link", "set", port, "master", "br0")
        self._start_end(name, "eth0", self.latency)
        self._start_end(self.switch, port, None)
        _call("ip", "-n", name, "link", "set", "lo", "up")

    def _start_end(self, namespace: str, device: str, latency: str | None) -> None:
        for arguments in shaping(self.rate, latency):
            try:
                _call("tc", "-n", namespace, "qdisc", "add", "dev", device, *arguments)
            except EmulationError as error:
                if "netem" not in arguments:
                    raise
                raise EmulationError(
                    "this kernel cannot delay packets, it has no netem (CONFIG_NET_SCH_NETEM): "
                    f"leave out the latency of {latency} [{error}]"
                ) from None
        _call("ip", "-n", namespace, "link", "set", device, "up")

    def down(self) -> None:
        """End every process in the network, and leave no trace of it; twice does no harm."""
        self.stop(everything=True)
        for namespace in [*self.hosts, self.switch]:
            if Path("/run/netns", namespace).exists():
                _call("ip", "netns", "del", namespace)
            shutil.rmtree(Path("/etc/netns", namespace), ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def link(self, host: int, up: bool) -> None:
        """Pull the cable of a host out of the switch, or put it back."""
        _call("ip", "-n", self.switch, "link", "set", f"h{host}", "up" if up else "down")

    def stop(self, everything: bool = False) -> None:
        """End the job that runs, or every process that anyone started in the network."""
        for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + seconds
            while (pids := self._processes(everything)) and time.monotonic() < deadline:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(0.05)

    def _processes(self, everything: bool) -> list[int]:
        networks, tag = set(), f"{_TAG}={self.name}".encode()
        for namespace in [*self.hosts, self.switch]:
            with contextlib.suppress(FileNotFoundError):
                networks.add(Path("/run/netns", namespace).stat().st_ino)
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if (entry / "ns/net").stat().st_ino in networks and (
                    everything or tag in (entry / "environ").read_bytes().split(b"\0")
                ):
                    found.append(int(entry.name))
        return found

    def run(
        self,
        command: Sequence[str],
        mode: str = "ranks",
        *,
        ranks_per_host: int = 1,
        hosts: int | None = None,
        timeout: float = math.inf,
        grace: float = 5.0,
        env: Mapping[str, str] | None = None,
        capture: bool = True,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a job, and end all of it before returning, whatever happens.

        Args:
            command: program and arguments.
            mode: "ranks" one process a rank, with the variables that torchrun sets; "each" once on
                each host, with those that torchrun reads; "head" once on the first host; "mpi" by
                mpirun from the first host. An mpirun of the job's own finds the hosts as well.
            hosts: the first so many hosts only.
            timeout: seconds until the job is ended; the return code is then 124.
            grace: seconds the other processes of a job have after one has failed.
            env: variables on top of this process's own.
            capture: return what all ranks printed, to stdout and stderr, as `stdout`.
        """
        count = self.count if hosts is None else hosts
        if mode not in MODES or not 1 <= count <= self.count or ranks_per_host < 1:
            raise EmulationError(
                f"mode {mode!r} with {ranks_per_host} ranks on each of {count} hosts: "
                f"{self.count} hosts are up, and the modes are {', '.join(MODES)}"
            )
        base = {**os.environ, **self._variables(count, ranks_per_host), **(env or {})}
        processes: list[subprocess.Popen[bytes]] = []
        with self._turn(), tempfile.TemporaryFile("w+", errors="replace") as output:
            try:
                for host, arguments, more in _plan(command, mode, count, ranks_per_host):
                    out = output if capture else None
                    processes.append(self._start(host, arguments, {**base, **more}, out))
                code = _outcome(processes, timeout, grace)
            finally:
                self.stop()
                for process in processes:
                    process.kill()
                    process.wait()
            output.seek(0)
            return subprocess.CompletedProcess(list(command), code, output.read())

    def _start(
        self, host: int, command: Sequence[str], env: Mapping[str, str], out: IO[str] | None
    ) -> "subprocess.Popen[bytes]":
        name = self.hosts[host]
        whole = ["ip", "netns", "exec", name, *_WITH_NAME, name, *command]
        err = subprocess.STDOUT if out else None
        return subprocess.Popen(whole, env=env, stdout=out, stderr=err, stdin=subprocess.DEVNULL)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One job at a time, as they share the links; what a killed one left is ended first."""
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EmulationError(
                    f"a job is running on {self.name!r}: wait for it, or `stop` it, or bring up "
                    "other hosts with --name"
                ) from None
            self.stop()
            with _guard("stop", self.name):
                yield

    def _variables(self, count: int, ranks: int) -> dict[str, str]:
        hostfile = self.folder / "hostfile"
        hostfile.write_text("".join(f"{h} slots={ranks}\n" for h in self.hosts[:count]))
        found = {_TAG: self.name, "MASTER_ADDR": self.addresses[0], "MASTER_PORT": "29500"}
        found |= {f"PET_{k}": found[k] for k in ("MASTER_ADDR", "MASTER_PORT")}
        found |= {"PET_NNODES": str(count), "PET_NPROC_PER_NODE": str(ranks)}
        found |= {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
        for tool, launcher, ssh in (("PRTE", "prte", "ssh"), ("OMPI", "orte", "rsh")):  # 5, and 4
            found |= {f"{tool}_ALLOW_RUN_AS_ROOT{suffix}": "1" for suffix in ("", "_CONFIRM")}
            found[f"{tool}_MCA_plm_{ssh}_agent"] = str(self.folder / "agent")
            found[f"{tool}_MCA_{launcher}_default_hostfile"] = str(hostfile)
        # The hosts share the processors: a rank neither keeps one to itself nor spins on it.
        found["PRTE_MCA_hwloc_default_binding_policy"] = "none"
        found["OMPI_MCA_hwloc_base_binding_policy"] = "none"
        found |= {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_pml": "ob1"}
        if sys.prefix != sys.base_prefix:  # a virtual environment, activated or not
            found["PATH"] = f"{sys.prefix}/bin:{os.environ.get('PATH', os.defpath)}"
        return found


def _plan(
    command: Sequence[str], mode: str, hosts: int, ranks: int
) -> Iterator[tuple[int, Sequence[str], dict[str, str]]]:
    """Host, command and further variables of each process to start."""
    if mode == "mpi":
        command = ["mpirun", "-np", str(hosts * ranks), *command]
    for host in range(1 if mode in ("head", "mpi") else hosts):
        node = {k: str(host) for k in ("NODE_RANK", "GROUP_RANK", "PET_NODE_RANK")}
        if mode != "ranks":
            yield host, command, node if mode == "each" else {}
            continue
        for local in range(ranks):
            numbers = (host * ranks + local, hosts * ranks, local, ranks)
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            yield host, command, node | dict(zip(names, map(str, numbers), strict=True))


def _outcome(processes: Sequence["subprocess.Popen[bytes]"], limit: float, grace: float) -> int:
    """Wait for all; the first failure's return code, else 124 for too late, else 0."""
    deadline, code = time.monotonic() + limit, 0
    while True:
        codes = [process.poll() for process in processes]
        if not code and any(codes):
            code = next(c for c in codes if c)
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
    guard = subprocess.Popen(
        ["sh", "-c", script, "sh", *this], stdin=subprocess.PIPE, start_new_session=True
    )
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
    name = name or f"emu{os.getpid()}"
    with _guard("down", name):
        hosts = EmulatedHosts.up(count, rate, latency, name=name, owner=os.getpid())
        try:
            yield hosts
        finally:
            hosts.down()


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
    for mode, text in (
        ("--torchrun", "one process a rank, with the variables torchrun sets (default)"),
        ("--mpi", "mpirun, from the first host, on all of them"),
        ("--each", "the command once on each host, with the variables torchrun itself reads"),
        ("--head", "the command once, on the first host; its mpirun finds the others"),
    ):
        value = {"--torchrun": "ranks"}.get(mode, mode[2:])
        modes.add_argument(mode, dest="mode", action="store_const", const=value, help=text)
    run.set_defaults(mode="ranks")
    run.add_argument("--ranks-per-host", type=int, default=1, metavar="R", help="default: 1")
    run.add_argument("--hosts", type=int, metavar="N", help="the first N hosts only")
    run.add_argument("--timeout", type=float, default=math.inf, metavar="SECONDS")
    run.add_argument(
        "--grace", type=float, default=5.0, metavar="SECONDS", help="for the rest after one failed"
    )
    run.add_argument("command", nargs="+", metavar="-- COMMAND", help="program and arguments")
    return parser


def _act(options: argparse.Namespace) -> int:
    if options.action == "up":
        EmulatedHosts.up(options.hosts, options.rate, options.latency, name=options.name)
    elif options.action == "status":
        for net in EmulatedHosts.all():
            print(net.name, f"{net.count} hosts", net.rate, net.latency or "no added latency")
    elif options.action == "down" and not (_RECORDS / options.name).exists():
        print(f"no emulated hosts named {options.name!r} are up", file=sys.stderr)
    elif options.action in ("down", "stop"):
        getattr(EmulatedHosts.find(options.name), options.action)()
    elif options.action == "link":
        EmulatedHosts.find(options.name).link(options.host, options.state == "up")
    else:
        keys = ("mode", "ranks_per_host", "hosts", "timeout", "grace")
        chosen = {key: getattr(options, key) for key in keys}
        net = EmulatedHosts.find(options.name)
        return net.run(options.command, capture=False, **chosen).returncode
    return 0


def main() -> int:
    options = _parser().parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))
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


if __name__ == "__main__":
    sys.exit(main())
