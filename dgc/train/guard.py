"""Notices gradients that are added to the mean of the step before."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from dgc.errors import GradientError


class Guard:
    """Watches each parameter's gradient just before it is added to `.grad`.

    After `delivered()`, `.grad` holds a mean over ranks. A backward pass that adds to it, because
    nobody called `zero_grad`, would have that mean enter the memory a second time. One inside `no_sync`
    whose sum is then dropped by `zero_grad`, as of a GAN's generator in its discriminator, does no harm.

    Attributes:
        used: the names that got a gradient since the last `delivered`.
        handles: of its hooks, to remove them.
    """

    def __init__(self, params: Mapping[str, Parameter]) -> None:
        self.params = dict(params)
        self.used: set[str] = set()
        self._delivered: set[str] = set()
        self._stale: dict[str, Tensor] = {}  # bool, whether .grad still holds the mean
        self.handles = [p.register_hook(self._hook(name, p)) for name, p in self.params.items()]

    def _hook(self, name: str, param: Parameter) -> Callable[[Tensor], None]:
        def before(_: Tensor) -> None:
            self.used.add(name)
            if name in self._delivered or name in self._stale:
                self._delivered.discard(name)
                was = self._stale.pop(name, True)
                if param.grad is not None:
                    self._stale[name] = param.grad.any() & was

        return before

    def delivered(self) -> None:
        """The mean lies in `.grad`."""
        self._delivered = set(self.params)
        self.used.clear()
        self._stale.clear()

    def check(self) -> None:
        """Call before the exchange of a step ends.

        Raises:
            GradientError: a gradient was added to the mean of the step before.
        """
        stale, self._stale = self._stale, {}
        if stale and bool(torch.stack(list(stale.values())).any()):
            raise GradientError(
                "a backward pass added to gradients that already hold the mean of the step before: "
                "call optimizer.zero_grad() after each step, and run all but the last backward "
                "pass of a step inside no_sync()"
            )
