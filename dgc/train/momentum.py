"""The part of SGD's momentum that is the same on all ranks, applied after the exchange.

Weight decay, and the mean gradient of excluded parameters, need no sending: SGD is linear in what
enters its momentum, so their share of it is kept here and added to what arrived.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class LocalMomentum:
    """One momentum buffer for each parameter that needs one, by name, in the paper's place of SGD's.

        d = wd·p  (+ g̅ if excluded)
        b ← m·b + (1 − dampening)·d          the first time b ← d, as torch.optim.SGD does
        g̅ ← g̅ + b                           Nesterov: + d + m·b

    Attributes:
        buffers: b by parameter name, with the parameter's shape and dtype.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def add_(
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
        else:
            param.grad.add_(d, alpha=sign * scale)
