"""What the framework scripts share: a model, each rank's own data, and what must hold at the end."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dgc

CONFIG = dgc.DGC(density=0.05, min_selected=1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def samples(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, generator=generator)
    return list(zip(x, x[:, :4].abs(), strict=True))


def check(state: Any, model: nn.Module, steps: int) -> None:
    """The hook ran on each of `steps` steps, sent little, and left all ranks with one model."""
    stats = state.stats()
    numel = sum(p.numel() for p in model.parameters())
    assert all(type(value) in (int, float, str) for value in stats.values()), stats  # a flat dict
    assert stats["steps"] == steps, stats
    assert stats["dense_bytes"] == steps * 4 * numel, stats
    assert 0 < stats["sent_bytes"] < stats["dense_bytes"] / 8, stats
    same_on_all_ranks(model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def same_on_all_ranks(model: nn.Module) -> None:
    mine = flat(model)
    both = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(both, mine)
    assert all(torch.equal(mine, other) for other in both)
