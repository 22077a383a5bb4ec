"""The user's momentum in two shares: what enters the memory of a rank, and what needs no sending.

Weight decay and the mean gradient of excluded parameters are the same on all ranks: their momentum
is kept here and applied after the exchange.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from dgc.core import kernels
from dgc.train.bucket import Row


class Owned(NamedTuple):
    """A parameter, and the options of its group of the wrapped optimizer."""

    name: str
    param: Parameter
    group: dict[str, Any]
    excluded: bool = False
    """Whether what arrives is the mean of whole gradients, and still needs momentum."""
    masked: float = 0.0
    """The share of all ranks' momentum that was cleared where an element was sent in this step."""
    scale: float = 1.0
    """Factor of the local share: 0 where the rate is 0 and the optimizer is stepped with 1."""
    first: bool = False
    """Whether its momentum begins with this step."""

    @property
    def arrived(self) -> Tensor:
        """This rank's part of `.grad`."""
        assert self.param.grad is not None
        return local(self.param.grad)


def local(param: Any) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    part: Tensor = param.to_local() if hasattr(param, "to_local") else param
    return part


class Momentum(Protocol):
    """Momentum as the memory applies it in the place of an optimizer.

    Attributes:
        buffers: the share that needs no sending, by parameter name, with its shape and dtype.
    """

    buffers: dict[str, Tensor]

    in_memory: bool
    """Whether the memory needs u for it."""

    def row(self, param: Parameter, group: dict[str, Any], *, first: bool) -> Row:
        """How the gradient of `param` enters the memory; `first` at its first step."""
        ...

    def local_(self, owned: Sequence[Owned]) -> None:
        """Add the local share of each, times its scale, to `.grad`, the mean that arrived."""
        ...

    def after(self, params: Mapping[str, Parameter]) -> None:
        """The optimizer's step is over."""
        return

    def forget(self) -> None:
        """The step was interrupted: it gives nothing back."""
        return

    def without(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options with which the optimizer applies nothing of this again."""
        ...


class SgdMomentum(Momentum):
    """SGD is linear in what enters its momentum, so the shares add up to SGD on the mean gradient.

        d = wd·p  (+ g̅ if excluded)
        b ← m·b + (1 − dampening)·d          b ← d where momentum begins, as torch.optim.SGD does
        g̅ ← g̅ + b                           Nesterov: + d + m·b
        b ← (1 − masked)·b where g̅ arrived   not if excluded, or sent without masking

    The last line is momentum factor masking, as if each rank's u held its share of b: `masked` is 1/N,
    or what `Bucket.masked` says. Without it the decay is up to 1/(1 − m) times too strong where elements
    are sent often (docs/log.md, 2026-11-25).

    Attributes:
        buffers: b by parameter name, with the parameter's shape and dtype.
    """

    in_memory = True

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def row(self, param: Parameter, group: dict[str, Any], *, first: bool) -> Row:
        # Without momentum torch takes no dampening either.
        gain = 1.0 if first or not group["momentum"] else 1 - group["dampening"]
        # Nesterov's form is the same without momentum, and leaves nothing in u for one that begins later.
        return Row(group["momentum"], gain, nesterov=group["nesterov"] or not group["momentum"])

    def without(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}

    @torch.no_grad()
    def local_(self, owned: Sequence[Owned]) -> None:
        """Overwrite `.grad` of each."""
        decaying, rows = [], []
        for each in owned:
            group = each.group
            scale = _sign(group) * each.scale
            if each.excluded:
                self._whole_(each)
            elif not group["momentum"]:
                if group["weight_decay"]:
                    each.arrived.add_(local(each.param), alpha=scale * group["weight_decay"])
            elif group["weight_decay"] or each.name in self.buffers:
                gain = self._opened(each)
                options = group["weight_decay"], group["momentum"], gain, group["nesterov"]
                rows.append((*options, scale, 1 - each.masked))
                decaying.append(each)
        if decaying:
            kernels.decay_(
                [each.arrived for each in decaying],
                [local(each.param) for each in decaying],
                [local(self.buffers[each.name]) for each in decaying],
                torch.tensor(rows, dtype=torch.float32),
            )

    def _opened(self, each: Owned) -> float:
        """The factor of d in its momentum; the buffer is there from here on."""
        if each.name not in self.buffers:
            self.buffers[each.name] = torch.zeros_like(each.param)
        return 1.0 if each.first else float(1 - each.group["dampening"])

    def _whole_(self, each: Owned) -> None:
        """What the optimizer would make of the mean of whole gradients."""
        group, grad = each.group, each.arrived
        d = group["weight_decay"] * local(each.param) + _sign(group) * grad
        if group["momentum"]:
            gain = self._opened(each)
            buffer = local(self.buffers[each.name]).mul_(group["momentum"]).add_(d, alpha=gain)
            d = d + group["momentum"] * buffer if group["nesterov"] else buffer
        grad.copy_(_sign(group) * each.scale * d)


def _sign(group: dict[str, Any]) -> int:
    return -1 if group["maximize"] else 1  # SGD negates the gradient before it adds the decay
