"""Adam behind a compressed exchange: each rank's gradient enters the memory over the root of its own
second moment, and what arrives is a step, not a gradient.

    s ← β2·s + (1 − β2)·g²                     on each rank
    v ← v + g / (√ŝ + ε)                          ŝ is s without its bias towards zero
    p ← (1 − lr·λ)·p − lr·√N·mean of what arrives   λ AdamW's weight decay

With `fold_lr` the rate is in the second line in place of the third.

An element is sent once in many steps. The moments of what arrives would be moments of these arrivals,
which top-k makes all about equally large: dividing by their root forgets what was accumulated.

β1 is not applied: what waits in v is as late as a momentum that reaches back 1/(N·density) steps, and
a momentum on top costs accuracy. √N because the noise of one rank's gradient is √N times that of the
mean, so that s is N times as large where noise prevails. docs/log.md, 2026-11-25.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dgc.core import kernels
from dgc.errors import ConfigError
from dgc.train.bucket import Row
from dgc.train.momentum import Momentum, Owned, local

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
        self._hidden: dict[str, Tensor | None] = {}

    def row(self, param: Parameter, group: dict[str, Any], *, first: bool) -> Row:
        return Row(applied_lr=1 / _unit(param))

    def without(self, group: dict[str, Any]) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def enter_(
        self, owned: Sequence[Owned], grads: Sequence[Tensor], rows: Sequence[Row]
    ) -> tuple[list[Tensor], list[Row]]:
        """`grads` over the roots of their second moments, contiguous float32.

        Those that are so already are overwritten, but where their memory has other owners: of
        x + p[None] p has the gradient that x has, and the backward pass goes on with it. If one is
        not finite, or has a square that is not, all become NaN and none enters s.
        """
        pairs = zip(owned, grads, strict=True)
        entering = kernels.dense(
            [g.clone() if _has_others(each.param, g) else g for each, g in pairs]
        )
        table = []
        for each, g, row in zip(owned, entering, rows, strict=True):
            group, gain = each.group, -row.gain if each.group["maximize"] else row.gain
            if group["weight_decay"] and not _is_decoupled(group):
                decay = local(each.param).reshape(g.shape)
                g.mul_(gain).add_(decay, alpha=group["weight_decay"])
                gain = 1.0
            if each.name not in self.seconds:
                self.seconds[each.name] = torch.zeros_like(g).view(-1)
                self.updates[each.name] = torch.zeros((), dtype=torch.float64, device=g.device)
            beta2 = float(group["betas"][1])
            table.append((gain, beta2, 1 - beta2, float(group["eps"])))
        counts = [self.updates[each.name] for each in owned]
        options = torch.tensor(table, dtype=torch.float64)
        kept = options[:, 1].to(counts[0].device, non_blocking=True)
        scales = (1 - kept ** (torch.stack(counts) + 1)).rsqrt().float()
        seconds = [self.seconds[each.name] for each in owned]
        finite = kernels.precondition_(entering, seconds, scales, options.float())
        one = torch.as_tensor(finite).to(counts[0])
        # A list, since of a tensor alone torch reads the number on the host, which waits for it.
        torch._foreach_add_(counts, [one] * len(counts))
        return entering, [row._replace(gain=1.0) for row in rows]

    @torch.no_grad()
    def local_(self, owned: Sequence[Owned]) -> None:
        """Apply `.grad` of each, and hide it from the optimizer until `after`."""
        alike: dict[tuple[Any, ...], list[Owned]] = {}
        for each in owned:
            if not each.excluded:
                decays = each.group["weight_decay"] and _is_decoupled(each.group)
                decay = float(each.group["lr"]) * each.group["weight_decay"] if decays else 0.0
                alpha = -self.factor * each.scale / _unit(each.param)
                key = 1 - decay, alpha, each.param.device, each.param.dtype
                alike.setdefault(key, []).append(each)
        for (kept, alpha, *_), chosen in alike.items():
            params = [local(each.param) for each in chosen]
            if kept != 1:
                torch._foreach_mul_(params, kept)
            torch._foreach_add_(params, [each.arrived for each in chosen], alpha=alpha)
            for each in chosen:
                self._hidden[each.name] = each.param.grad
                each.param.grad = None

    def after(self, params: Mapping[str, Parameter]) -> None:
        for name, grad in self._hidden.items():
            params[name].grad = grad
        self._hidden.clear()

    def forget(self) -> None:
        self._hidden.clear()


def check_adam(group: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for options that the memory does not apply."""
    if group["amsgrad"]:
        raise ConfigError(
            "amsgrad is not supported with momentum correction, which keeps Adam's second moment on "
            "each rank: use amsgrad=False, or dgc.DGC(momentum_correction=False)"
        )


def _has_others(param: Parameter, grad: Tensor) -> bool:
    """Whether other tensors lie in the memory of `grad`, if it is the `.grad` of `param`.

    What DDP and FSDP hand over is theirs alone.
    """
    if param.grad is not grad:
        return False
    count = getattr(torch._C, "_storage_Use_Count", None)
    alone = 2  # the tensor, and the object that the count is asked of
    return count is None or count(grad.untyped_storage()._cdata) > alone


def _unit(param: Tensor) -> float:
    return 1.0 if param.dtype is torch.float16 else UNIT  # float16 would round it to zero


def _is_decoupled(group: Mapping[str, Any]) -> bool:
    return bool(group["decoupled_weight_decay"])
