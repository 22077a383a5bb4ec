"""How often the host waits for a GPU: the Triton kernels in their interpreter, tensors marked."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dgc
from dgc.core import kernels
from dgc.core.layout import Layout
from dgc.train.bucket import Row, updates
from dgc.train.memory import Memory
from dgc.train.step import receive_, send_
from tests.core.waits import Waits

NUMELS = (3, 5000, 70, 9000)


class Launched:
    """A kernel that is not looked into."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with torch._C.DisableTorchFunction():
                self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    pytest.importorskip("triton")
    from dgc.core.kernels import cuda

    for name in ("_check", "_advance"):
        monkeypatch.setattr(cuda, name, Launched(getattr(cuda, name)))
    monkeypatch.setattr(kernels, "_for", lambda device: cuda)
    for cached in (cuda._blocks, cuda._wanted):  # what other tests have made is not marked
        cached.cache_clear()
    with Waits() as mode:
        yield mode


def normal(seed: int, waits: Waits) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(numel, generator=generator) for numel in NUMELS]
    waits.mark(*drawn)
    return drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_wait_once_and_the_codec_twice(dtype: torch.dtype, waits: Waits) -> None:
    layout = Layout.of(NUMELS, torch.device("cpu"))
    memory = Memory(layout, dgc.DGC(density=0.01, state_dtype=dtype))
    row = updates([Row()] * len(NUMELS))
    for step in range(3):
        memory.begin(step)
        waits.found.clear()
        message, sent = send_(memory, normal(step, waits), row, 0.01, [True] * len(NUMELS))
    assert sent.batch.indices.numel() > 0
    # One read in the kernels; the codec takes indices and values to the host.
    assert waits.found == ["tolist", "to", "to"]

    waits.found.clear()
    grads = normal(0, waits)
    gathered = torch.stack([message] * 3)
    receive_(gathered, grads, [1 / 3] * len(NUMELS))
    assert waits.found == ["cpu"]


def test_what_waits_is_noticed() -> None:
    device = torch.device("cpu")
    with Waits() as mode:
        there = torch.zeros(3, device=device)
        for wait in (
            lambda: bool((there > 0).any()),
            lambda: (there + 1).sum().item(),
            lambda: torch.tensor([1, 2], device=device),
            lambda: torch.tensor([1, 2]).to(device),
            lambda: (there > 0).nonzero(),
            lambda: torch.arange(3).repeat_interleave(there.long()),
        ):
            mode.found.clear()
            wait()
            assert len(mode.found) == 1
        mode.found.clear()
        torch.tensor([1, 2]).to(device, non_blocking=True)
        torch.arange(3).tolist()
        assert mode.found == []
