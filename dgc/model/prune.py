"""Magnitude pruning: masks that survive the optimizer, schedules and penalties to get there.

Source: Han, Pool, Tran, Dally, *Learning both Weights and Connections*, arXiv 1506.02626; the
cubic schedule is Zhu and Gupta's, arXiv 1710.01878.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dgc.core.select import num_selected, topk_mask
from dgc.errors import ConfigError
from dgc.model.constrain import (
    Constraint,
    bind_root,
    choose,
    constraint_of,
    refuse_non_finite,
    refuse_others,
    weights_of,
)

Model = TypeVar("Model", bound=nn.Module)


class Mask(Constraint):
    """Weights that are not kept are zero; the buffer `<name>_mask` is bool, true where kept."""

    suffix = "mask"

    def gradient(self, buffer: Tensor, grad: Tensor) -> Tensor:
        if grad.is_sparse:  # of an embedding: the projection after the step is enough
            return grad
        return grad.masked_fill(~buffer, 0)

    def project_(self, buffer: Tensor, values: Tensor) -> None:
        values.masked_fill_(~buffer, 0)


def prune(
    model: Model,
    density: float | dict[str, float] = 0.1,
    *,
    scope: str = "layer",
    structure: float | dict[str, float] = 0.0,
) -> Model:
    """Keep the largest weights by magnitude and hold the others at zero from now on.

    Pruned again, a weight that is already pruned stays so: lower the density step by step and
    retrain between. Whatever the optimizer does, masks hold (`dgc.model.constrain`). In a model
    wrapped by DDP prune `ddp.module`: the masks then follow from equal weights on all ranks and
    are never sent. Pruned before wrapping, they are buffers that DDP broadcasts.

    Args:
        model: changed in place. Biases and other one-dimensional parameters are kept whole
            unless named.
        density: share of weights kept, in (0, 1], for all or by layer or parameter name.
        scope: `"layer"`, each weight tensor to its own density; `"global"`, one number for all
            of them together, so that layers compete, which takes several times their memory.
        structure: γ, for all weights or by name. A weight counts as |w|·(‖row‖·‖column‖)^γ, rows
            being the first dimension, so that rows and columns that hold much keep more of it. Such
            positions cost fewer bytes in the file: with 0.5 for LeNet-5's large layer a quarter
            fewer at the same accuracy (docs/log.md, 2026-11-26); convolutions lost by it. `fold` removes
            the units that it leaves without inputs.

    Returns:
        `model`.

    Raises:
        ConfigError: if a density or γ is out of range, a name unknown, the scope neither, a weight
            nan or shared already; nothing is pruned then.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.5, -2.0, 1.0]]))
        >>> prune(layer, density=0.6).weight.tolist()
        [[0.0, -2.0, 1.0]]
    """
    chosen = choose(model, density, "density")
    for name, (_, _, share) in chosen.items():
        if not 0 < share <= 1:
            raise ConfigError(f"density of {name} is {share}: give a number in (0, 1]")
    for module, own, _ in chosen.values():
        refuse_unmaskable(module, own)
    by_name = structure if isinstance(structure, dict) else dict.fromkeys(chosen, structure)
    gammas = {n: gamma for n, (_, _, gamma) in choose(model, by_name, "structure").items()}
    refuse_others(gammas, chosen, "structure", "density")
    for name, gamma in gammas.items():
        if not 0 <= gamma < float("inf"):
            raise ConfigError(f"structure of {name} is {gamma}: give 0 or more")
    scores = {
        n: _score(m.get_parameter(own).detach(), gammas.get(n, 0.0))
        for n, (m, own, _) in chosen.items()
    }
    if scope == "global":
        if isinstance(density, dict):
            raise ConfigError("a global density is one number: scope='layer' takes a dict")
        masks = _global_masks(scores, density)
    elif scope == "layer":
        masks = {n: _top(scores[n], share) for n, (_, _, share) in chosen.items()}
    else:
        raise ConfigError(f"scope is {scope!r}: 'layer' or 'global'")
    for name, (module, own, _) in chosen.items():
        apply_mask(module, own, masks[name])
    bind_root(model)
    return model


def _score(weight: Tensor, gamma: float) -> Tensor:
    """What weights are compared by: themselves, or times powers of their row's and column's norm."""
    if not gamma or weight.dim() < 2:
        return weight
    # Squares stay in range: an exact power of two brings the largest to about 1.
    exponent = math.frexp(float(weight.abs().max()))[1] if weight.numel() else 0
    wide, limit = (torch.float64, 1000) if weight.dtype == torch.float64 else (torch.float32, 126)
    scale = 2.0 ** max(-limit, min(limit, -exponent))
    matrix = (weight.flatten(1) * scale).float()
    norms = [matrix.norm(dim=1, keepdim=True), matrix.norm(dim=0, keepdim=True)]
    gains = [norm / norm.square().mean().sqrt().clamp(min=1e-30) for norm in norms]
    scores: Tensor = (matrix * (gains[0] * gains[1]) ** gamma).to(wide) / scale
    return scores.view(weight.shape)


def _top(weight: Tensor, density: float) -> Tensor:
    return topk_mask(weight, num_selected(weight.numel(), density))


def _global_masks(weights: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    device = next(iter(weights.values())).device
    every = torch.cat([weight.reshape(-1).to(device) for weight in weights.values()])
    parts = _top(every, density).split([weight.numel() for weight in weights.values()])
    pairs = zip(weights.items(), parts, strict=True)
    return {name: part.view(weight.shape).to(weight.device) for (name, weight), part in pairs}


def apply_mask(module: nn.Module, name: str, kept: Tensor) -> None:
    """Hold `module`'s parameter `name` at zero wherever bool `kept` is false, or was before."""
    refuse_unmaskable(module, name)
    earlier = constraint_of(module, name)
    if earlier is not None:
        kept = kept & earlier.buffer(module)
    Mask(name).install(module, kept.clone())


def refuse_unmaskable(module: nn.Module, name: str) -> None:
    """Raise a `ConfigError` if `module`'s parameter `name` has shared values or no name for a mask."""
    earlier = constraint_of(module, name)
    if earlier is not None and not isinstance(earlier, Mask):
        raise ConfigError(f"{name} already has shared values: prune before share, or release first")
    Mask(name).refuse_taken(module)


def prune_by_std(model: Model, quality: float | dict[str, float]) -> Model:
    """Prune the weights below `quality` standard deviations of their layer's kept weights.

    Args:
        model: changed in place.
        quality: threshold / standard deviation, 0 or more, for all or by name.

    Returns:
        `model`.

    Raises:
        ConfigError: if a quality is out of range, a name unknown, a weight not finite or shared
            already; nothing is pruned then.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.1, -2.0, 2.0, 0.3]]))
        >>> prune_by_std(layer, 1.0).weight.tolist()
        [[0.0, -2.0, 2.0, 0.0]]

    Source: Han et al., arXiv 1506.02626, section 3.
    """
    chosen = choose(model, quality, "quality")
    for name, (module, own, share) in chosen.items():
        if not share >= 0:
            raise ConfigError(f"quality of {name} is {share}: give 0 or more")
        refuse_non_finite(module, own, name)
        refuse_unmaskable(module, own)
    for module, own, share in chosen.values():
        weight = module.get_parameter(own).detach()
        earlier = constraint_of(module, own)
        alive = weight[earlier.buffer(module)] if isinstance(earlier, Mask) else weight
        apply_mask(module, own, weight.abs() >= share * alive.std(correction=0))
    bind_root(model)
    return model


def import_masks(model: Model) -> Model:
    """Take over the masks of `torch.nn.utils.prune`, which are removed from `model`.

    Example:
        >>> import torch.nn.utils.prune as torch_prune
        >>> layer = torch_prune.l1_unstructured(nn.Linear(4, 1), "weight", amount=3)
        >>> sorted(import_masks(layer).state_dict())
        ['bias', 'weight', 'weight_mask']
    """
    from torch.nn.utils import prune as torch_prune

    for module in list(model.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, torch_prune.BasePruningMethod):
                name = hook._tensor_name
                kept = module.get_buffer(f"{name}_mask") != 0
                torch_prune.remove(module, name)
                apply_mask(module, name, kept)
    bind_root(model)
    return model


def densities(model: nn.Module) -> dict[str, float]:
    """Share of non-zero weights in each weight tensor.

    Example:
        >>> densities(prune(nn.Linear(4, 2), density=0.5))
        {'weight': 0.5}
    """
    return {
        name: float((module.get_parameter(own) != 0).double().mean())
        for name, (module, own) in weights_of(model).items()
    }


def cubic_density(step: int, begin: int, end: int, final: float, initial: float = 1.0) -> float:
    """Density at `step`: `initial` until `begin`, then final + (initial − final)·(1 − t)³.

    t runs from 0 at `begin` to 1 at `end`: quickly at first, while redundant weights abound.

    Example:
        >>> [cubic_density(step, 0, 10, final=0.0) for step in (0, 5, 10, 99)]
        [1.0, 0.125, 0.0, 0.0]

    Source: Zhu and Gupta, arXiv 1710.01878, equation 1.
    """
    if not 0 <= begin < end:
        raise ConfigError(f"a schedule from step {begin} to {end}: give 0 <= begin < end")
    t = min(1.0, max(0.0, (step - begin) / (end - begin)))
    return final + (initial - final) * (1 - t) ** 3


def prune_iteratively(
    model: Model, steps: Iterable[float | dict[str, float]], retrain: Callable[[Model], object]
) -> Model:
    """Prune to each density in turn and call `retrain(model)` after each.

    Example:
        >>> seen = []
        >>> _ = prune_iteratively(
        ...     nn.Linear(4, 2), [0.5, 0.25], lambda m: seen.append(densities(m)["weight"])
        ... )
        >>> seen
        [0.5, 0.25]
    """
    for density in steps:
        prune(model, density)
        retrain(model)
    return model


def l1_penalty(model: nn.Module) -> Tensor:
    """Σ |w| over the weights that `prune` acts on, a scalar to add to the loss.

    Drives weights to zero; after pruning, retraining with L2 is more accurate (arXiv 1506.02626,
    section 3.1).
    """
    return _total([weight.abs().sum() for weight in _weights(model)])


def l2_penalty(model: nn.Module) -> Tensor:
    """Σ w² over the weights that `prune` acts on, a scalar to add to the loss."""
    return _total([weight.square().sum() for weight in _weights(model)])


def _weights(model: nn.Module) -> list[Tensor]:
    return [module.get_parameter(own) for module, own in weights_of(model).values()]


def _total(sums: list[Tensor]) -> Tensor:
    return torch.stack([each.to(sums[0].device) for each in sums]).sum()
