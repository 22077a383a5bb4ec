"""Adam behind a compressed exchange: each rank's gradient enters the memory over the root of its own
second moment, and what arrives is a step, not a gradient.

    s ← β2·s + (1 − β2)·g²                     on each rank
    v ← v + lr·g / (√ŝ + ε)                    ŝ is s without its bias towards zero
    p ← (1 − lr·λ)·p − √N·mean of what arrives   λ AdamW's weight decay

An element is sent once in many steps. The moments of what arrives would be moments of these arrivals,
which top-k makes all about equally large: dividing by their root forgets what was accumulated.

β1 is not applied: what waits in v is as late as a momentum that reaches back 1/(N·density) steps, and
a momentum on top costs accuracy. √N because the noise of one rank's gradient is √N times that of the
mean, so that s is N times as large where noise prevails. docs/log.md, 2026-11-25.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dgc.errors import ConfigError
from dgc.train.bucket import Row
from dgc.train.momentum import Momentum

UNIT = 2.0**-20
"""`.grad` holds UNIT times the step that arrived: so small that clipping gradients by norm, as
trainers do after the exchange, leaves it as it is. A power of two, so nothing is rounded."""


class AdamSteps(Momentum):
    """Adam and AdamW in the memory; the optimizer itself steps excluded parameters alone.

    Args:
        world_size: N.

    Attributes:
        seconds: s of this rank by parameter name, flat float32.
        updates: how many gradients entered it, on its device.
    """

    in_memory = False

    def __init__(self, world_size: int) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.seconds: dict[str, Tensor] = {}
        self.updates: dict[str, Tensor] = {}
        self.factor = math.sqrt(world_size)
        self._hidden: dict[str, Tensor] = {}

    def row(self, param: Parameter, group: dict[str, Any], *, first: bool) -> Row:
        return Row(applied_lr=1 / _unit(param))

    def without(self, group: dict[str, Any]) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def enter_(
        self, name: str, grad: Tensor, row: Row, param: Parameter, group: dict[str, Any]
    ) -> tuple[Tensor, Row]:
        """`grad` over the root of its second moment, contiguous float32; overwrites it if it is.

        A gradient that is not finite, or whose square is not, becomes NaN and does not enter s.
        """
        beta2, eps = float(group["betas"][1]), float(group["eps"])
        entering = grad.to(torch.float32).contiguous()
        g = entering.view(-1).mul_(-row.gain if group["maximize"] else row.gain)
        if group["weight_decay"] and not _is_decoupled(group):
            g.add_(_local(param).reshape(-1), alpha=group["weight_decay"])
        if name not in self.seconds:
            self.seconds[name] = torch.zeros_like(g)
            self.updates[name] = torch.zeros((), dtype=torch.float64, device=g.device)
        second, count = self.seconds[name], self.updates[name]
        updated = (beta2 * second).addcmul_(g, g, value=1 - beta2)
        finite = updated.isfinite().all()  # not read by the host
        second.copy_(torch.where(finite, updated, second))
        count.add_(finite)
        root = second.div(1 - beta2 ** count.clamp(min=1)).sqrt_().add_(eps)
        g.div_(torch.where(finite, root, torch.nan))
        return entering, row._replace(gain=1.0)

    @torch.no_grad()
    def local_(
        self, name: str, param: Parameter, group: dict[str, Any], *, excluded: bool, scale: float
    ) -> None:
        """Apply `param.grad`, and hide it from the optimizer until `after`."""
        if excluded:
            return
        assert param.grad is not None
        if group["weight_decay"] and _is_decoupled(group):
            param.mul_(1 - float(group["lr"]) * group["weight_decay"])
        param.add_(param.grad, alpha=-self.factor * scale / _unit(param))
        self._hidden[name] = param.grad
        param.grad = None

    def after(self, params: Mapping[str, Parameter]) -> None:
        for name, grad in self._hidden.items():
            params[name].grad = grad
        self._hidden.clear()


def check_adam(group: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for options that the memory does not apply."""
    if group["amsgrad"]:
        raise ConfigError(
            "amsgrad is not supported with momentum correction, which keeps Adam's second moment on "
            "each rank: use amsgrad=False, or dgc.DGC(momentum_correction=False)"
        )


def _unit(param: Tensor) -> float:
    return 1.0 if param.dtype is torch.float16 else UNIT  # float16 would round it to zero


def _is_decoupled(group: Mapping[str, Any]) -> bool:
    return bool(group["decoupled_weight_decay"])


def _local(param: Any) -> Tensor:
    """This rank's part of a DTensor, or the parameter itself."""
    part: Tensor = param.to_local() if hasattr(param, "to_local") else param
    return part
