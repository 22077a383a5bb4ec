"""Notices gradients that are added to the mean of the step before, or share memory."""

from bisect import bisect_right, insort
from collections.abc import Callable, Mapping
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn import Parameter

from dgc.errors import GradientError


class Places:
    """Where gradients lie that have come in a step."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: dict[int, tuple[int, str]] = {}

    def clear(self) -> None:
        self._begins.clear()
        self._ends.clear()

    def taken(self, name: str, grad: Tensor) -> bool:
        """Whether the gradient of another name lies there too, or partly; if not, it is noted."""
        begin = grad.data_ptr()
        end = begin + grad.nbytes
        if not grad.is_contiguous():
            strides = zip(grad.shape, grad.stride(), strict=True)
            end = begin + grad.itemsize * (1 + sum((size - 1) * each for size, each in strides))
        at = bisect_right(self._begins, begin)
        for other in self._begins[max(0, at - 1) : at + 1]:
            other_end, owner = self._ends[other]
            if owner != name and other < end and begin < other_end:
                return True
        if begin not in self._ends:
            insort(self._begins, begin)
        self._ends[begin] = end, name
        return False


class Guard:
    """Watches each parameter's gradient just before it is added to `.grad`.

    After `delivered()`, `.grad` holds a mean over ranks. A backward pass that adds to it, because
    nobody called `zero_grad`, would have that mean enter the memory a second time. One inside `no_sync`
    whose sum is then dropped by `zero_grad`, as of a GAN's generator in its discriminator, does no harm.

    Autograd may give two parameters one memory as `.grad`: a and b of `a.view(4, 4) + b.view(4, 4)`.
    Means are written there, and decay, so the second gets a copy.

    Attributes:
        used: the names that got a gradient since the last `delivered`.
        handles: of its hooks, to remove them.
    """

    def __init__(self, params: Mapping[str, Parameter]) -> None:
        self.params = dict(params)
        self.used: set[str] = set()
        self._delivered: set[str] = set()
        self._stale: dict[str, Tensor] = {}  # bool, whether .grad still holds the mean
        self._stepped: dict[str, tuple[ReferenceType[Tensor], int]] = {}
        self._places = Places()
        self.handles = [p.register_hook(self._hook(name, p)) for name, p in self.params.items()]

    def _hook(self, name: str, param: Parameter) -> Callable[[Tensor], Tensor | None]:
        def before(grad: Tensor) -> Tensor | None:
            self.used.add(name)
            if name in self._delivered or name in self._stale:
                self._delivered.discard(name)
                was = self._stale.pop(name, True)
                if param.grad is not None:
                    self._stale[name] = param.grad.any() & was
            if param.grad is not None or grad.layout != torch.strided or not grad.numel():
                return None
            return grad.clone() if self._places.taken(name, grad) else None

        return before

    def delivered(self) -> None:
        """The mean lies in `.grad`."""
        self._delivered = set(self.params)
        self.used.clear()
        self._stale.clear()
        self._places.clear()

    def stepped(self) -> None:
        """A step was made with it: what lies in `.grad` now is no gradient."""
        self._stepped = {
            name: (ref(p.grad), p.grad._version)
            for name, p in self.params.items()
            if p.grad is not None and not p.grad.is_inference()
        }

    def check(self) -> None:
        """Call before the exchange of a step ends.

        Raises:
            GradientError: a gradient was added to the mean of the step before, or is that mean.
        """
        left = [
            found
            for name, (grad, version) in self._stepped.items()
            if (found := self.params[name].grad) is not None
            and (found is grad() and found._version == version and name not in self.used)
        ]
        if any(bool(grad.any()) for grad in left):
            raise GradientError(
                "step() without a backward pass: gradients still hold the mean of the step before, "
                "which would enter the memory again. Call optimizer.zero_grad() after each step"
            )
        stale, self._stale = self._stale, {}
        if stale and bool(torch.stack(list(stale.values())).any()):
            raise GradientError(
                "a backward pass added to gradients that already hold the mean of the step before: "
                "call optimizer.zero_grad() after each step, and run all but the last backward "
                "pass of a step inside no_sync()"
            )
