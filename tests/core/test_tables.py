"""What was recorded keeps the tables that it reads, whatever is looked up later."""

import contextlib
import gc
import threading
import weakref
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from dgc.core.kernels import graph
from dgc.core.tables import Table, keeping


@Table
def row(number: int) -> Tensor:
    return torch.full((3,), number)


def test_the_last_are_remembered() -> None:
    assert row(1) is row(1)
    first = row(0)
    for number in range(1, 1025):
        row(number)
    assert row(0) is not first


def test_what_was_recorded_keeps_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDAGraph", "Stream", "current_stream", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    graph._stream.cache_clear()
    recorded = graph.Graph(lambda: row(7).sum(), torch.device("cuda", 1))
    torch.cuda.device.assert_called_once_with(torch.device("cuda", 1))
    graph._stream.cache_clear()
    there = weakref.ref(row(7))
    for number in range(2000, 3100):
        row(number)
    gc.collect()
    assert there() is not None
    del recorded
    gc.collect()
    assert there() is None


def test_another_thread_keeps_nothing() -> None:
    with keeping() as kept:
        thread = threading.Thread(target=row, args=(5,))
        thread.start()
        thread.join()
        row(6)
    row(8)
    assert [int(each[0]) for each in kept if isinstance(each, Tensor)] == [6]
