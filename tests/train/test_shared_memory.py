"""Gradients that autograd gives one memory are exchanged, and decay, as if they had their own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from tests.processes import run_processes

KINDS = [torch.optim.SGD, torch.optim.AdamW]


class Added(nn.Module):
    """Parameters whose gradients lie in one memory, or with `apart` do not: whole, and in part."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.a, self.b = (nn.Parameter(torch.randn(16)) for _ in range(3))
        self.c, self.d = (nn.Parameter(torch.randn(8)) for _ in range(2))
        self.one = 1.0 if apart else None

    def forward(self, x: Tensor) -> Tensor:
        named = (self.a, self.b, torch.cat([self.c, self.d]))
        parts = [p.view(4, 4) if self.one is None else p.view(4, 4) * self.one for p in named]
        if self.one is not None:
            parts[2] = torch.cat([self.c * 1.0, self.d * 1.0]).view(4, 4) * 1.0
        return (x @ (self.below.square().view(4, 4) + (parts[0] + parts[1]) + parts[2])).tanh()


def trained(kind: Any, apart: bool, config: dgc.DGC, passes: int, ddp: bool) -> list[Tensor]:
    model: nn.Module = Added(apart)
    inner = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = inner
    whole: nn.Module = DistributedDataParallel(model) if ddp else model
    if ddp:
        dgc.register(whole, inner, config)
    else:
        optimizer = dgc.DistributedOptimizer(inner, model.named_parameters(), config)
    quiet = whole.no_sync if ddp else optimizer.no_sync  # type: ignore[union-attr]
    for step in range(3):
        optimizer.zero_grad()
        for index in range(passes - 1):
            with quiet():
                whole(torch.full((2, 4), 1.0 + step + index)).square().sum().backward()
        whole(torch.full((2, 4), 0.5)).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def check(kind: Any, config: dgc.DGC, passes: int, ddp: bool = False) -> None:
    both = (trained(kind, apart, config, passes, ddp) for apart in (False, True))
    for found, wanted in zip(*both, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_in_a_wrapper(kind: Any, passes: int, bucket_bytes: int) -> None:
    check(kind, dgc.DGC(density=0.5, min_selected=1, bucket_bytes=bucket_bytes), passes)


def under_ddp() -> None:
    for kind in KINDS:
        for exclude in ((), ("a", "b")):
            for passes in (1, 2):
                check(kind, dgc.DGC(density=0.5, min_selected=1, exclude=exclude), passes, ddp=True)


def test_under_ddp() -> None:
    assert run_processes(1, {"ddp": under_ddp})["ddp"] == [None]


class Placed(nn.Module):
    """Positions whose gradient is, or with `apart` is not, the one that goes on to the layer below."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.apart = nn.Linear(4, 4), apart
        self.positions = nn.ParameterList([torch.randn(8, 4)])  # the last: it is sent first

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions[0] * 1.0 if self.apart else self.positions[0]
        return (self.below(x) + positions.unsqueeze(0)).tanh()


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_goes_on_with_a_gradient_that_is_sent(kind: Any) -> None:
    found = []
    for model in (Placed(False), Placed(True)):
        inner = kind(model.parameters(), lr=0.1, weight_decay=0.1)
        config = dgc.DGC(density=0.5, min_selected=1, bucket_bytes=1)
        optimizer = dgc.DistributedOptimizer(inner, model.named_parameters(), config)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.full((1, 8, 4), 1.0 + step)).square().sum().backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *found))
