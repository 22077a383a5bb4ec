"""How often the host waits for a GPU: there torch refuses to, else calls that would are counted."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import dgc
from dgc.core import layout as layouts
from dgc.core.layout import Layout
from dgc.train import assemble
from dgc.train.bucket import CompressedBucket, Row, updates
from dgc.train.inner import InnerStep
from dgc.train.memory import Memory
from dgc.train.recorded import Recorder, Sender
from tests.core.on_device import DEVICE, use_device_path
from tests.core.waits import Waits

NUMELS = (3, 5000, 70, 9000)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    use_device_path(monkeypatch)
    from dgc.core.kernels import codec_cuda, cuda, cuda_message, cuda_tables, decode_torch
    from dgc.train import arrive

    caches = (
        cuda_tables.blocks_of,
        cuda._wanted,
        codec_cuda._slots,
        decode_torch._ends,
        arrive._head,
        cuda_message._near,
        cuda_message._far,
    )
    for cached in (
        *caches,
        assemble._head,
        layouts._uploaded,
    ):  # what other tests have made is not marked
        cached.cache_clear()
    with Waits() as mode:
        yield mode


def normal(seed: int, waits: Waits) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(numel, generator=generator) for numel in NUMELS]
    drawn = [each.to(DEVICE, non_blocking=True) for each in drawn]
    waits.mark(*drawn)
    return drawn


@contextmanager
def refused(on: bool) -> Iterator[None]:
    """If `on`, what waits for the GPU raises."""
    if not on:
        yield
        return
    with warnings.catch_warnings(action="ignore"):  # that this is new in torch
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("value_bits", [1, 4, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sender_does_not_wait(dtype: torch.dtype, value_bits: int, waits: Waits) -> None:
    layout = Layout.of(NUMELS, DEVICE)
    memory = Memory(layout, dgc.DGC(density=0.01, state_dtype=dtype, value_bits=value_bits))
    row, sender = updates([Row()] * len(NUMELS)), Sender(memory)
    for step in range(Recorder.unrecorded + 2):
        memory.begin(step)
        grads = [grad * 10**step for grad in normal(step, waits)]  # thresholds never fit
        waits.uploads.clear()
        with refused(DEVICE.type == "cuda" and step > 0):
            _, sent = sender.send_(grads, row, 0.01, [True] * len(NUMELS))
        if step == 0:  # short tables are uploaded with a wait when they are first needed, and kept
            waits.found.clear()
    assert waits.found == waits.uploads == []  # but for one copy to where the recorded work looks
    assert sent.batch.values.abs().min() > 0


@pytest.mark.parametrize("value_bits", [1, 4, 32])
def test_the_receiver_waits_once(value_bits: int, waits: Waits) -> None:
    """Whether all ranks apply the step is for the host to know: it reads a line about each message."""
    layout = Layout.of(NUMELS, DEVICE)
    config = dgc.DGC(density=0.01, value_bits=value_bits)
    bucket = CompressedBucket(Memory(layout, config), world_size=3)
    rows, used = [Row()] * len(NUMELS), [True] * len(NUMELS)
    message = bucket.send(normal(0, waits), rows, used, 0)
    for step in range(Recorder.unrecorded + 2):
        grads = normal(1, waits)
        gathered = torch.stack([message] * 3)
        waits.found.clear()
        assert bucket.receive_(gathered, grads, rows) == (True, tuple(used))
        if step == 0:  # short tables, kept
            assert set(waits.found) <= {"cpu", "to"}
    assert waits.found == ["cpu"]
    assert all(bool((grad != 0).any()) for grad in grads)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimizers_share_does_not_wait(kind: Any, waits: Waits) -> None:
    params = [torch.nn.Parameter(drawn) for drawn in normal(0, waits)]
    group = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {}
    optimizer = kind(params, lr=0.1, weight_decay=0.1, **group)
    named = {str(i): param for i, param in enumerate(params)}
    inner = InnerStep(optimizer, named, dgc.DGC(), world_size=2)
    for step in range(3):
        grads = normal(step, waits)
        waits.found.clear()
        with refused(DEVICE.type == "cuda" and step > 0):
            entering, _ = inner.enter_([*named], grads, [inner.row(name) for name in named])
            for param, grad in zip(params, entering, strict=True):
                param.grad = grad
            waits.mark(*params, *entering)
            inner.before({})
            inner.after()
        if step == 0:  # short tables, kept
            assert set(waits.found) <= {"to"}
    assert waits.found == []


def test_what_waits_is_noticed() -> None:
    device = DEVICE
    with Waits() as mode:
        there = torch.zeros(3, device=device)
        for wait in (
            lambda: bool((there > 0).any()),
            lambda: (there + 1).sum().item(),
            lambda: torch.tensor([1, 2], device=device),
            lambda: torch.tensor([1, 2]).to(device),
            lambda: (there > 0).nonzero(),
            lambda: torch._foreach_add_([there, there], there[0]),
            lambda: torch.arange(3, device=device).repeat_interleave(there.long()),
        ):
            mode.found.clear()
            wait()
            assert len(mode.found) == 1
        mode.found.clear()
        torch.tensor([1, 2]).to(device, non_blocking=True)
        torch.arange(3).tolist()
        assert mode.found == []
