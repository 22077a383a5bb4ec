"""Dense → Sparse: which elements are sent."""

import math

import torch
from torch import Tensor

from dgc.core.sparse import Sparse
from dgc.errors import ConfigError


def num_selected(numel: int, density: float) -> int:
    """k = max(1, ceil(density · numel)): how many of `numel` elements are sent at `density` in (0, 1].

    Example:
        >>> num_selected(5000, 0.001), num_selected(10, 0.001)
        (5, 1)
    """
    # A product such as 0.001 * 5000 may land one ulp above the integer that is meant.
    return min(numel, max(1, math.ceil(density * numel * (1 - 1e-12))))


def select_topk(tensor: Tensor, k: int) -> Sparse:
    """The `k` elements of largest magnitude, in ascending order of index.

    Among equal magnitudes the choice is deterministic for a given device.

    Args:
        tensor: floating point, any shape, read as flat; not kept.
        k: how many, in [1, numel].

    Raises:
        ConfigError: if `k` is out of range.

    Example:
        >>> select_topk(torch.tensor([1.0, -5.0, 0.0, 3.0]), 2)
        Sparse(indices=tensor([1, 3]), values=tensor([-5.,  3.]), numel=4)
    """
    flat = tensor.detach().reshape(-1)
    if not 1 <= k <= flat.numel():
        raise ConfigError(f"k is {k} for a tensor of {flat.numel()} elements: give 1 <= k <= numel")
    indices = torch.topk(flat.abs(), k, sorted=False).indices.sort().values
    return Sparse(indices, flat[indices], flat.numel())
