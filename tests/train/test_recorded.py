"""When a bucket's work is recorded."""

from collections.abc import Callable
from typing import Any

import pytest

from dgc.core.kernels import graph
from dgc.train.recorded import Recorder


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
        def __init__(self, recorded: Callable[[], Any]) -> None:
            assert recorded is work

        def replay(self) -> int:
            work.replayed += 1
            return -work.replayed

    monkeypatch.setattr(graph, "Graph", Replayed)
    return work


def test_work_is_recorded_when_it_was_asked_for_often_enough(counted: Counted) -> None:
    recorder: Recorder[int] = Recorder()
    found = [recorder.run("same", counted) for _ in range(Recorder.unrecorded + 2)]
    assert found == [1, 2, 3, -1, -2]
    assert recorder.recorded


def test_other_work_is_not_replayed(counted: Counted) -> None:
    recorder: Recorder[int] = Recorder()
    for _ in range(Recorder.unrecorded + 1):
        recorder.run("same", counted)
    assert recorder.run("another", counted) == Recorder.unrecorded + 1
    assert not recorder.recorded
    for density in range(20):  # as in warm-up
        recorder.run(density, counted)
    assert counted.replayed == 1


def test_training_goes_on_if_it_cannot_be_recorded(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(work: Callable[[], Any]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "Graph", refuse)
    recorder: Recorder[int] = Recorder()
    for _ in range(Recorder.unrecorded):
        recorder.run("same", counted)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        assert recorder.run("same", counted) == Recorder.unrecorded + 1
    assert recorder.run("same", counted) == Recorder.unrecorded + 2  # and it warns once
