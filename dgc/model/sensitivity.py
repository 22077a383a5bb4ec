"""How much each layer minds being pruned, and densities that follow from it.

Source: Han, Pool, Tran, Dally, arXiv 1506.02626, figure 6, for the measurement.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from dgc.core.select import num_selected, topk_mask
from dgc.errors import ConfigError
from dgc.model.constrain import refuse_sharded, weights_of
from dgc.model.picture import line_picture
from dgc.model.progress import bar
from dgc.model.prune import refuse_unmaskable

Model = TypeVar("Model", bound=nn.Module)

LEAST_SHARE = 0.01
"""A layer that showed no loss is taken to mind a hundredth as much as the one that minds most."""
LEAST_DENSITY = 0.002
BROKEN = 1e24
"""A layer that made a score nan or infinite minds this many times as much as the worst other, so it
is kept dense before any other gets more than the least."""


class Sensitivity(dict[str, float]):
    """Density by weight name, as `prune` takes it, chosen under a total budget from measurements.

    Attributes:
        baseline: `evaluate` of the model as it was.
        scores: weight name → {density: score with that weight alone pruned to it}.
        numels: weight name → number of weights.
    """

    def __init__(
        self,
        baseline: float,
        scores: Mapping[str, Mapping[float, float]],
        numels: Mapping[str, int],
        budget: float,
    ) -> None:
        self.baseline = baseline
        self.scores = {name: dict(by_density) for name, by_density in scores.items()}
        self.numels = dict(numels)
        super().__init__(self.allocate(budget))

    def allocate(self, budget: float) -> dict[str, float]:
        """Densities that spend `budget`, a share of all weights, where the loss is least.

        A layer's loss at density d is modelled as s·(1/d − 1), with s fitted to its scores. The
        total over layers is least, for Σ n·d = budget·Σ n, at d ∝ sqrt(s / n), at most 1. A layer
        with a score that is nan or infinite stays dense as far as the budget allows.

        Args:
            budget: total density, in (0, 1].

        Example:
            >>> scores = {"small": {0.5: 90.0}, "large": {0.5: 99.0}}
            >>> found = Sensitivity(100.0, scores, {"small": 100, "large": 900}, budget=0.1)
            >>> {name: round(d, 3) for name, d in found.items()}
            {'small': 0.513, 'large': 0.054}
        """
        if not LEAST_DENSITY <= budget <= 1:
            raise ConfigError(f"budget is {budget}: give a density in [{LEAST_DENSITY}, 1]")
        wish = self._wishes()
        low, high = 0.0, 1 / min(wish.values())
        total = budget * sum(self.numels.values())
        for _ in range(100):
            middle = (low + high) / 2
            spent = sum(self.numels[n] * _clip(middle * w) for n, w in wish.items())
            low, high = (middle, high) if spent <= total else (low, middle)
        return {name: _clip(low * w) for name, w in wish.items()}

    def _wishes(self) -> dict[str, float]:
        """sqrt(s / n) of each layer."""
        losses = {
            name: sum(max(0.0, self.baseline - score) for score in by_density.values())
            / sum(1 / d - 1 for d in by_density)
            for name, by_density in self.scores.items()
            if all(map(math.isfinite, by_density.values()))
        }
        most = max(losses.values(), default=0.0) or 1.0
        losses |= {name: BROKEN * most for name in self.scores if name not in losses}
        floor = LEAST_SHARE * most
        return {n: math.sqrt(max(loss, floor) / self.numels[n]) for n, loss in losses.items()}

    def plot(self, path: str | Path) -> None:
        """Write a picture of score over density, one line a layer.

        Raises:
            MissingPackageError: without matplotlib.
        """
        lines = {n: [*sorted(s.items()), (1.0, self.baseline)] for n, s in self.scores.items()}
        line_picture(lines, "density of this layer alone", "score", path)


def _clip(density: float) -> float:
    return min(1.0, max(LEAST_DENSITY, density))


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    density: float | Sequence[float] = 0.5,
    *,
    budget: float = 0.1,
    progress: bool = False,
) -> Sensitivity:
    """Score the model with each weight tensor pruned alone, in turn, and choose densities.

    Args:
        model: left as it was.
        evaluate: model → score, larger is better; accuracy on held-out data, say. Of a pruned layer
            nan or infinity is taken as the worst there is.
        density: one, or several, in (0, 1).
        budget: total density of the chosen densities.
        progress: show a bar.

    Returns:
        A dict of densities for `prune`, with the scores, `.plot(path)` and `.allocate(budget)`.

    Raises:
        ConfigError: if a density is out of range, the model has no weights, a sharded one or one of
            shared values, or the score without pruning is not finite.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> found = sensitivity(layer, lambda m: m(torch.ones(2)).item(), density=0.5)
        >>> found.baseline, found.scores
        (4.0, {'weight': {0.5: 3.0}})
        >>> layer.weight.tolist()
        [[3.0, 1.0]]
    """
    steps = list(density) if isinstance(density, Sequence) else [density]
    weights = {n: at for n, at in weights_of(model).items() if at[0].get_parameter(at[1]).numel()}
    if not steps or not all(0 < d < 1 for d in steps) or not weights:
        raise ConfigError(f"densities {steps} of {len(weights)} weights: give some in (0, 1)")
    for name, (module, own) in weights.items():
        refuse_sharded(module.get_parameter(own), name)
        refuse_unmaskable(module, own)
    baseline = float(evaluate(model))
    if not math.isfinite(baseline):
        raise ConfigError(f"evaluate gives {baseline} for the model as it is: give a finite score")
    scores: dict[str, dict[float, float]] = {name: {} for name in weights}
    for name, step in bar([(n, d) for n in weights for d in steps], "sensitivity", progress):
        module, own = weights[name]
        scores[name][step] = _score_pruned(model, module.get_parameter(own), step, evaluate)
    numels = {n: module.get_parameter(own).numel() for n, (module, own) in weights.items()}
    return Sensitivity(baseline, scores, numels, budget)


def _score_pruned(
    model: nn.Module, weight: nn.Parameter, density: float, evaluate: Callable[[nn.Module], float]
) -> float:
    original = weight.detach().clone()
    kept = topk_mask(original, num_selected(original.numel(), density))
    try:
        weight.data.masked_fill_(~kept, 0)
        return float(evaluate(model))
    finally:
        weight.data.copy_(original)
