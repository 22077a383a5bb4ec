"""Faults on links: the job ends with a clear error on all ranks, or goes on unharmed."""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dgc
from dgc.comm.base import Done
from dgc.errors import WireError
from launch.emulate_hosts import EmulatedHosts, emulated_hosts
from tests.launching import ROOT, environment
from tests.needs import needs_namespaces
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, train, wrap

DAMAGED = 6  # the step whose exchange is damaged


class Damaging:
    """A communicator that flips one bit of what arrives from rank 0, once, when `armed`."""

    def __init__(self, comm: ThreadCommunicator, kind: str, place: float) -> None:
        self.comm, self.kind, self.place, self.armed = comm, kind, place, False

    def __getattr__(self, name: str) -> object:
        return getattr(self.comm, name)

    def duplicate(self) -> "Damaging":
        return self

    def _flip(self, message: Tensor) -> None:
        if self.armed and message.numel():
            message[int(self.place * (message.numel() - 1))] ^= 16
            self.armed = False

    def all_gather(self, message: Tensor) -> Done:
        result = self.comm.all_gather(message).wait()
        if self.kind == "all_gather":
            self._flip(result[0])
        return Done(result)

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        result = self.comm.all_to_all(messages)
        if self.kind == "all_to_all":
            self._flip(result[0])
        return result

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        self.comm.broadcast_(tensor, root)
        if self.kind == "broadcast_":
            self._flip(tensor)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("all-gather", "all_gather"),
        ("re-selecting", "all_to_all"),
        ("re-selecting", "all_gather"),
        ("shared-indices", "broadcast_"),
    ],
)
def test_a_damaged_message_changes_no_parameter(pattern: str, kind: str, place: float) -> None:
    config = dgc.DGC(density=0.1, min_selected=4, pattern=pattern)

    def body(comm: ThreadCommunicator) -> tuple[list[Tensor], str]:
        damaging = Damaging(comm, kind, place)
        model, after = Toy(), []
        optimizer = wrap(model, config, damaging)
        try:
            for step in range(DAMAGED + 3):
                damaging.armed = step == DAMAGED and comm.rank == 1 and damaged
                train(model, optimizer, range(step, step + 1))
                after.append(flat(model))
        except WireError:
            comm.shared_barrier.abort()  # as the end of this process would
            return [*after, flat(model)], "damaged"
        except threading.BrokenBarrierError:
            return [*after, flat(model)], "alone"
        return after, "ended"

    damaged = False
    right = run_ranks(3, body)[0][0]
    damaged = True
    found = run_ranks(3, body)
    for after, _ in found:  # whatever happened, nobody has a step that the others do not
        assert all(any(torch.equal(each, r) for r in right) for each in after)
    ends = [end for _, end in found]
    if ends != ["ended"] * 3:  # a bit of the padding may be harmless
        assert ends == ["alone", "damaged", "alone"]
        assert len(found[1][0]) == DAMAGED + 1
        assert torch.equal(found[1][0][-1], right[DAMAGED - 1])
    if place < 0.9:
        assert ends[1] == "damaged"


def pull_the_cable(hosts: EmulatedHosts, folder: Path, seconds: float | None) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    hosts.link(1, up=False)
    (folder / "cut").touch()
    if seconds is not None:
        time.sleep(seconds)
        hosts.link(1, up=True)


def linked(hosts: EmulatedHosts, folder: Path, timeout: float, seconds: float | None) -> list[str]:
    """What the ranks say of a job whose link is cut for `seconds`; None is for good."""
    folder.mkdir()
    puller = threading.Thread(target=pull_the_cable, args=(hosts, folder, seconds))
    puller.start()
    try:
        script = [sys.executable, str(ROOT / "tests/ranks/linked.py"), str(folder), str(timeout)]
        command = ["env", f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", *script]
        done = hosts.run(command, timeout=120, grace=30)
    finally:
        puller.join()
        hosts.link(1, up=True)
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert len(said) == 2, done.stdout
    return said


@needs_namespaces
def test_a_link_that_is_cut(tmp_path: Path) -> None:
    """For two seconds: the job goes on unharmed. For good: all ranks stop within the timeout."""
    with emulated_hosts(2, "100mbit") as hosts:
        undisturbed = linked(hosts, tmp_path / "0", 30, 0)
        assert all("ended with" in line for line in undisturbed)
        assert len({line.split()[-1] for line in undisturbed}) == 1
        assert linked(hosts, tmp_path / "1", 30, 2.0) == undisturbed
        stopped = linked(hosts, tmp_path / "2", 8, None)
        assert all("stopped: a collective failed" in line for line in stopped)


def test_a_job_killed_twenty_times_ends_as_if_it_was_not(tmp_path: Path) -> None:
    def digest(folder: str, kills: int) -> str:
        (tmp_path / folder).mkdir()
        arguments = [str(tmp_path / folder), str(kills), "1"]
        done = subprocess.run(
            [sys.executable, "tests/ranks/resuming.py", *arguments],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    assert digest("killed", 20) == digest("undisturbed", 0)
