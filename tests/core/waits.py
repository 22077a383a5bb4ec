"""Counts where the host would wait for a GPU, on a machine without one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

READS = (
    *("tolist", "item", "cpu", "numpy", "nonzero", "unique"),
    *("__bool__", "__int__", "__float__", "__index__", "__len__", "equal"),
)


class Waits(TorchFunctionMode):
    """A tensor counts as on the GPU if a `torch.device` was named for it, or it was made of such.

    Attributes:
        found: what waited: reads by the host, and uploads that are not `non_blocking`.
        uploads: all that made a tensor on the GPU from the host's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.uploads: list[str] = []

    def mark(self, *tensors: Tensor) -> None:
        """These are on the GPU."""
        for tensor in tensors:
            tensor.on_gpu = True  # type: ignore[attr-defined]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name, leaves = function.__name__, tree_leaves([args, kwargs])
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        on_gpu = [hasattr(tensor, "on_gpu") for tensor in inputs]
        to_host = name == "cpu" or (name == "to" and "cpu" in leaves)
        placed = any(isinstance(leaf, torch.device) for leaf in leaves)
        if name == "__get__":
            waits = False  # an attribute: shape, device, ...
        elif name == "repeat_interleave":
            waits = any(on_gpu) and "output_size" not in kwargs
        elif placed and not any(on_gpu):
            made_there = name in ("zeros", "empty", "empty_like", "arange", "full")
            waits = not made_there and not kwargs.get("non_blocking")
            self.uploads += [] if made_there else [name]
        elif name.startswith("_foreach") and isinstance(args[-1], Tensor):
            waits = any(on_gpu)  # for the number that is in it
        else:
            waits = any(on_gpu) and (name in READS or to_host)
        if waits:
            self.found.append(name)
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and any(result is tensor for tensor in inputs):
            result = result.detach()  # here the same tensor, on a GPU another one
        if to_host:
            return result
        if any(on_gpu) or placed:
            self.mark(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result
