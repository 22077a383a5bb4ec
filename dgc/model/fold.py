"""Units that pruning has cut off: what is left of them moves into the next layer's bias.

A unit none of whose inputs is kept is a constant, act(bias). With γ = 0.5 two thirds of LeNet-5's
hidden units end so, and a fifth of the weights kept behind them would only multiply constants.
"""

from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from dgc.model.constrain import Binder, Constraint, bind_root, constraint_of
from dgc.model.prune import Mask, apply_mask

Model = TypeVar("Model", bound=nn.Module)

ELEMENTWISE = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Identity,
    nn.Dropout,
)
"""Layers that give equal units equal values; `nn.Dropout` does in evaluation."""


def fold(model: Model) -> Model:
    """Remove the units that pruning left without inputs, or without readers, from linear layers.

    Outputs stay the same but for rounding. Looks at pairs of pruned `nn.Linear` in an
    `nn.Sequential` with nothing but elementwise activations between them, and leaves alone what
    `model` uses twice or ties, layers with forward hooks other than dgc's own, and sequences with a
    `forward` of their own. A unit without inputs is constant: its part of the next layer's output is
    added to that layer's bias. Its bias and the weights that read it are masked, as are bias and
    weights of a unit that nothing reads, so that `prune` has their share for others, and a file holds
    them as zeros.

    It cannot see a model that takes values from inside a sequence, by a slice (`layers[:2](x)`) or
    layer by layer: there the units that are removed change.

    Args:
        model: changed in place. Both layers pruned (`prune`), not yet shared. A constant stays where
            the next layer has no bias that could take it.

    Returns:
        `model`.

    Raises:
        ConfigError: if a weight or bias to mask has shared values already.

    Example:
        >>> from dgc.model import prune
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> for p, values in zip(model.parameters(), ([[3.0, 1], [0, 0]], [0.0, 2], [[1.0, 5]], [7.0])):
        ...     _ = p.data.copy_(torch.tensor(values))
        >>> _ = fold(prune(model, density=1.0))
        >>> model[2].bias.tolist(), model[2].weight.tolist(), model[0].bias.tolist()
        ([17.0], [[1.0, 0.0]], [0.0, 0.0])
    """
    for first, between, second in _pairs(model):
        _fold(first, between, second)
    bind_root(model)
    return model


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Linear, list[nn.Module], nn.Linear]]:
    named = [*model.named_modules(remove_duplicate=False)]
    named += model.named_parameters(remove_duplicate=False)
    uses = Counter(id(used) for _, used in named)
    for sequence in model.modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        if type(sequence).forward is not nn.Sequential.forward:
            continue
        first: nn.Linear | None = None
        between: list[nn.Module] = []
        for layer in sequence:
            if _hooked(layer):
                first = None
            elif type(layer) is nn.Linear and all(
                uses[id(part)] == 1 for part in (layer, *layer.parameters())
            ):
                if first is not None:
                    yield first, between, layer
                first, between = layer, []
            elif type(layer) in ELEMENTWISE:
                between.append(layer)
            else:
                first = None


def _hooked(layer: nn.Module) -> bool:
    """Whether forward hooks that are not dgc's own may change or read what goes in or out."""
    own = (Binder, Constraint)
    return bool(layer._forward_hooks) or not all(
        isinstance(hook, own) for hook in layer._forward_pre_hooks.values()
    )


@torch.no_grad()
def _fold(first: nn.Linear, between: list[nn.Module], second: nn.Linear) -> None:
    if not all(isinstance(constraint_of(layer, "weight"), Mask) for layer in (first, second)):
        return
    fed, read = first.weight.any(1), second.weight.any(0)
    if bool((fed & read).all()):
        return
    constant = torch.zeros_like(second.weight[0]) if first.bias is None else first.bias.clone()
    for layer in between:
        constant = constant if isinstance(layer, nn.Dropout) else layer(constant)
    moved = second.weight @ constant.masked_fill(fed, 0)
    takes = _takes(second, moved)
    kept = fed & read if takes else read
    if first.bias is not None:
        apply_mask(first, "bias", kept)  # raises before anything is changed
    apply_mask(first, "weight", kept[:, None].expand_as(first.weight))
    if takes:
        second.bias.add_(moved)
        apply_mask(second, "weight", fed.expand_as(second.weight))


def _takes(layer: nn.Linear, moved: Tensor) -> bool:
    """Whether the bias of `layer` is free to change by `moved`."""
    own = constraint_of(layer, "bias") if layer.bias is not None else None
    if isinstance(own, Mask):  # of an earlier fold, or a user's
        return not bool(moved[~own.buffer(layer)].any())
    return layer.bias is not None and own is None
