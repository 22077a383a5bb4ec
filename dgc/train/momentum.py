"""The user's momentum in two shares: what enters the memory of a rank, and what needs no sending.

Weight decay and the mean gradient of excluded parameters are the same on all ranks: their momentum
is kept here and applied after the exchange.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from dgc.train.bucket import Row


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

    def enter_(
        self, name: str, grad: Tensor, row: Row, param: Parameter, group: dict[str, Any]
    ) -> tuple[Tensor, Row]:
        """What enters the memory for the gradient `grad`, which may be overwritten, and how."""
        return grad, row

    def local_(
        self, name: str, param: Parameter, group: dict[str, Any], *, excluded: bool, scale: float
    ) -> None:
        """Add `scale` times the local share to `param.grad`, the mean that arrived."""
        ...

    def after(self, params: Mapping[str, Parameter]) -> None:
        """The optimizer's step is over."""
        return

    def without(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options with which the optimizer applies nothing of this again."""
        ...


class SgdMomentum(Momentum):
    """SGD is linear in what enters its momentum, so the shares add up to SGD on the mean gradient.

        d = wd·p  (+ g̅ if excluded)
        b ← m·b + (1 − dampening)·d          the first time b ← d, as torch.optim.SGD does
        g̅ ← g̅ + b                           Nesterov: + d + m·b
        b ← (1 − masked)·b where g̅ arrived   not if excluded

    The last line is momentum factor masking, as if each rank's u held its share of b. Without it the
    decay is up to 1/(1 − m) times too strong where elements are sent often (docs/log.md, 2026-11-25).

    Args:
        masked: 1/N with momentum factor masking, else 0.

    Attributes:
        buffers: b by parameter name, with the parameter's shape and dtype.
    """

    in_memory = True

    def __init__(self, masked: float) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.masked = masked

    def row(self, param: Parameter, group: dict[str, Any], *, first: bool) -> Row:
        gain = 1.0 if first else 1 - group["dampening"]
        return Row(group["momentum"], gain, nesterov=group["nesterov"])

    def without(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}

    @torch.no_grad()
    def local_(
        self, name: str, param: Parameter, group: dict[str, Any], *, excluded: bool, scale: float
    ) -> None:
        """Add `scale` times the local share to `param.grad`.

        Args:
            name: key of the buffer.
            param: its `.grad` is overwritten.
            group: the parameter's group of the wrapped SGD.
            excluded: whether `param.grad` itself still needs momentum.
            scale: 1, or 0 where the learning rate is 0 and the optimizer is stepped with 1.
        """
        assert param.grad is not None
        decay, momentum = group["weight_decay"], group["momentum"]
        if not excluded and decay == 0:
            return
        sign = -1 if group["maximize"] else 1  # SGD negates the gradient before it adds the decay
        d = decay * param + (sign * param.grad if excluded else 0)
        if momentum:
            buffer = self.buffers.get(name)
            if buffer is None:
                buffer = self.buffers[name] = d.clone()
            else:
                buffer.mul_(momentum).add_(d, alpha=1 - group["dampening"])
            d = d + momentum * buffer if group["nesterov"] else buffer
        if excluded:
            param.grad.copy_(sign * scale * d)
            return
        arrived = param.grad != 0
        param.grad.add_(d, alpha=sign * scale)
        if momentum and self.masked:
            buffer = self.buffers[name]
            buffer.addcmul_(buffer, arrived.to(buffer.dtype), value=-self.masked)
