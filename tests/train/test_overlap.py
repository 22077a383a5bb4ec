"""Buckets exchange while the backward pass goes on: in order, in a profile, and in the stats."""

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import dgc
from dgc.comm.base import Handle, SelfCommunicator
from dgc.train.bucket import CompressedBucket
from dgc.train.optimizer import DistributedOptimizer

SECONDS = 0.5


class Slow(SelfCommunicator):
    """Two ranks that send the same; what is gathered takes SECONDS to arrive."""

    world_size = 2

    def all_gather(self, message: Tensor) -> Handle:
        return Arriving(message.repeat(2, 1))


class Arriving:
    def __init__(self, result: Tensor) -> None:
        self.result, self.due = result, time.perf_counter() + SECONDS

    def wait(self) -> Tensor:
        time.sleep(max(0.0, self.due - time.perf_counter()))
        return self.result


class Working(torch.autograd.Function):
    """The identity, whose backward pass takes two times SECONDS."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        with record_function("work"):
            time.sleep(2 * SECONDS)
        return grad


def test_an_exchange_is_hidden_behind_the_backward_pass() -> None:
    first, last = nn.Linear(8, 8), nn.Linear(8, 8)
    sgd = torch.optim.SGD([*first.parameters(), *last.parameters()], lr=0.1, momentum=0.9)
    named = [(f"{i}.{n}", p) for i, m in enumerate((first, last)) for n, p in m.named_parameters()]
    config = dgc.DGC(density=0.5, bucket_bytes=4 * 8 * 9)  # a layer each
    optimizer = DistributedOptimizer(sgd, named, config, Slow())
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        last(Working.apply(first(torch.ones(1, 8)))).sum().backward()
        optimizer.step()
    found: dict[str, list] = {"dgc::encode": [], "work": [], "dgc::exchange": []}
    for event in trace.events():
        if event.name in found:
            found[event.name].append(event.time_range)
    encoded, (work,), waited = found["dgc::encode"], found["work"], found["dgc::exchange"]
    assert len(encoded) == len(waited) == 2
    assert encoded[0].end <= work.start < work.end <= encoded[1].start
    # The first exchange has arrived when it is waited for, the second has nothing to hide behind.
    assert waited[0].elapsed_us() < 0.1e6 * SECONDS < 0.5e6 * SECONDS < waited[1].elapsed_us()
    # Under way for at least 2 · SECONDS and 1 · SECONDS, blocked for the latter.
    assert 0.5 < float(optimizer.stats()["overlap"]) < 1


def test_threads_of_one_backward_pass_start_each_bucket_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Autograd has a thread for each device; one bucket is on its way while others become ready."""
    params = {str(i): nn.Parameter(torch.ones(4)) for i in range(4)}
    sgd = torch.optim.SGD(params.values(), lr=0.1)
    config = dgc.DGC(density=1.0, bucket_bytes=1)
    reducer = DistributedOptimizer(sgd, params.items(), config, Slow()).reducer
    started: list[Any] = []

    def send(bucket: CompressedBucket, *args: Any) -> Tensor:
        started.append(bucket)
        time.sleep(0.05)
        return plain(bucket, *args)

    plain = CompressedBucket.send
    monkeypatch.setattr(CompressedBucket, "send", send)
    for param in params.values():
        param.grad = torch.ones(4)
    threads = [threading.Thread(target=reducer.ready, args=(name,)) for name in params]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reducer.finish()
    assert started == reducer.buckets
