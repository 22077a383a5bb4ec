"""When a bucket's work is recorded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dgc.config import DGC
from dgc.core.kernels import graph
from dgc.core.layout import Layout
from dgc.train.bucket import CompressedBucket, Row
from dgc.train.memory import Memory
from dgc.train.recorded import Recorder
from tests.core.on_device import DEVICE

CPU = torch.device("cpu")


class Counted:
    """Work that counts how often it ran, and what it was recorded as."""

    def __init__(self) -> None:
        self.ran, self.replayed = 0, 0

    def __call__(self) -> int:
        self.ran += 1
        return self.ran


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    work = Counted()

    class Replayed:
        def __init__(self, recorded: Callable[[], Any], device: torch.device) -> None:
            assert recorded is work
            assert device == CPU

        def replay(self) -> int:
            work.replayed += 1
            return -work.replayed

    monkeypatch.setattr(graph, "Graph", Replayed)
    return work


def test_work_is_recorded_when_it_was_asked_for_often_enough(counted: Counted) -> None:
    recorder: Recorder[int] = Recorder()
    found = [recorder.run("same", counted, CPU) for _ in range(Recorder.unrecorded + 2)]
    assert found == [1, 2, 3, -1, -2]
    assert recorder.recorded


def test_other_work_is_not_replayed(counted: Counted) -> None:
    recorder: Recorder[int] = Recorder()
    for _ in range(Recorder.unrecorded + 1):
        recorder.run("same", counted, CPU)
    assert recorder.run("another", counted, CPU) == Recorder.unrecorded + 1
    assert not recorder.recorded
    for _ in range(20):  # as in warm-up
        recorder.run(None, counted, CPU)
    assert counted.replayed == 1


def test_training_goes_on_if_it_cannot_be_recorded(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(work: Callable[[], Any], device: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "Graph", refuse)
    recorder: Recorder[int] = Recorder()
    for _ in range(Recorder.unrecorded):
        recorder.run("same", counted, CPU)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        assert recorder.run("same", counted, CPU) == Recorder.unrecorded + 1
    assert recorder.run("same", counted, CPU) == Recorder.unrecorded + 2  # and it warns once


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("numel", [0, 400])
def test_warm_up_is_not_recorded_and_neither_is_nothing(numel: int) -> None:
    """Where much is sent a graph would keep much memory; without a value the host makes the message."""
    config = DGC(density=0.1, warmup_steps=10)
    bucket = CompressedBucket(Memory(Layout.of([numel], DEVICE), config), world_size=2)
    grads, rows = [torch.ones(numel, device=DEVICE)], [Row()]
    for step in (0, 10):
        for _ in range(2 * Recorder.unrecorded + 2):
            message = bucket.send(grads, rows, [True], step)
            assert bucket.receive_(torch.stack([message] * 2), grads, rows).finite
        settled = step == 10 and numel > 0
        assert bucket._sender.recorder.recorded == settled
        assert bucket._receiver._read.recorded == bucket._receiver._write.recorded == settled
