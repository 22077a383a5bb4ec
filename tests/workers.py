"""Small training problems in which every gradient is given: the loss is Σ p·g."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import dgc
from dgc.config import Compression

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 7), "scale": ()}


class Toy(nn.Module):
    """Parameters of the shapes above, with values drawn with `seed`."""

    def __init__(self, seed: int = 0, integers: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator)
            self.register_parameter(
                name.replace(".", "_"), nn.Parameter(value.mul(8).round() if integers else value)
            )

    def loss(self, gradients: Sequence[Tensor | None]) -> Tensor:
        terms = zip(self.parameters(), gradients, strict=True)
        return torch.stack([(p * g).sum() for p, g in terms if g is not None]).sum()


def gradients(step: int, rank: int, integers: bool = False) -> list[Tensor]:
    """What rank `rank` finds at `step`."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    drawn = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
    return [g.mul(4).round() for g in drawn] if integers else drawn


def sgd_of(model: nn.Module, *options: dict[str, object]) -> torch.optim.SGD:
    """SGD over as many param groups as there are `options`."""
    params = list(model.parameters())
    cut = len(params) // len(options)
    groups = [
        {"params": params[i * cut : None if i + 1 == len(options) else (i + 1) * cut], **option}
        for i, option in enumerate(options)
    ]
    return torch.optim.SGD(groups, lr=0.1)


def wrap(
    model: nn.Module,
    compression: Compression,
    comm: object,
    *options: dict[str, object],
) -> dgc.DistributedOptimizer:
    sgd = sgd_of(model, *(options or ({"lr": 0.1, "momentum": 0.9},)))
    return dgc.DistributedOptimizer(sgd, model.named_parameters(), compression, comm)  # type: ignore[arg-type]


def train(
    model: Toy,
    optimizer: dgc.DistributedOptimizer,
    steps: range,
    find: Callable[[int, int], Sequence[Tensor | None]] = gradients,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.loss(find(step, optimizer.comm.rank)).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    """All parameters end to end."""
    return torch.cat([p.detach().view(-1) for p in model.parameters()])
