"""How close a selection is to the exact top-k, over many steps of a drifting gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dgc.core import kernels
from dgc.core.layout import Layout
from dgc.core.select import Selector, num_selected

TENTHS = 10


@dataclass(frozen=True)
class Quality:
    """Recall against exact top-k and the evenness of the selection, over all steps.

    Attributes:
        recall: share of the k largest magnitudes that were selected, one a step.
        most: largest number selected in a step, divided by k.
        shares: how often each tenth of the tensor was selected, divided by how often exact top-k
            would have.
    """

    recall: tuple[float, ...]
    most: float
    shares: tuple[float, ...]

    def row(self) -> dict[str, float]:
        return {
            "recall, mean": sum(self.recall) / len(self.recall),
            "recall, worst": min(self.recall),
            "most selected / k": self.most,
            "tenth, least": min(self.shares),
            "tenth, most": max(self.shares),
        }


def drifting(numel: int, generator: torch.Generator, scale: Tensor) -> Tensor:
    """The next gradient; `scale`, each element's own, log-normal at first, drifts a little.

    The whole gradient grows or shrinks by some 30 % from step to step, and a Student-like tail
    makes single elements many times larger than their scale.
    """
    scale.mul_(torch.randn(numel, generator=generator).mul_(0.02).exp_())
    level = torch.randn(1, generator=generator).mul_(0.3).exp_()
    tail = torch.rand(numel, generator=generator).clamp_(min=1e-4).pow_(-0.3)
    return torch.randn(numel, generator=generator).mul_(scale).mul_(tail).mul_(level)


def run(selector: Selector, numel: int, steps: int, density: float = 0.001) -> Quality:
    """Accumulate `steps` gradients with momentum 0.9 and masking; compare each selection."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(numel, generator=generator).exp_()
    layout, k = Layout.of([numel]), num_selected(numel, density)
    u, v, state = torch.zeros(numel), torch.zeros(numel), selector.state(layout)
    update = torch.tensor([[0.9, 1.0, 0.1, 0.0]])
    recall, most = [], 0.0
    selected, exact = torch.zeros(TENTHS), torch.zeros(TENTHS)
    for _ in range(steps):
        grad = drifting(numel, generator, scale)
        _, batch = selector.accumulate_select_([grad], u, v, layout, update, [k], state)
        # torch's own top-k is the judge: it shares no code with the kernels.
        best = torch.topk(v.abs(), k, sorted=False).indices
        recall.append(torch.isin(best, batch.indices).float().mean().item())
        most = max(most, batch.indices.numel() / k)
        selected += torch.bincount(batch.indices * TENTHS // numel, minlength=TENTHS)
        exact += torch.bincount(best * TENTHS // numel, minlength=TENTHS)
        kernels.release_(u, v, layout, batch, batch.values, masking=True)
    return Quality(tuple(recall), most, tuple((selected / exact).tolist()))
