"""The k-th largest magnitude of each tensor on a GPU, digit by digit; the host waits for nothing."""

from typing import Any

import torch
from torch import Tensor

from dgc.core.kernels import cuda_kernels as triton_kernels
from dgc.core.kernels.cuda_tables import BLOCK, Blocks

_SHIFTS = (24, 16, 8, 0)
"""Where the digits of a bit pattern begin, the highest first."""


def find_kth_(
    values: Tensor, blocks: Blocks, begins: Tensor, again: Tensor, exact: Tensor, rank: Tensor
) -> tuple[Tensor, Tensor]:
    """exact[t] ← the bits of the rank[t]-th largest of tensor t, where again[t] is not 0.

    Elsewhere the launches return at once.

    Args:
        values: all tensors end to end, float32, or bfloat16 as int16.
        blocks: programs for their elements.
        begins: int64, where each begins.
        again: int64 `[T]`.
        exact: int64 `[T]`, zeros; overwritten.
        rank: int64 `[T]`, overwritten: how many that equal exact[t] belong to the first rank[t].

    Returns:
        How many equal exact[t] in each block, int64; and up to each block.
    """
    grid, tensors = (blocks.owners.numel(),), (again.numel(),)
    sweep: tuple[Any, ...] = (values, *blocks[:3], begins, again)
    bins = again.new_zeros(again.numel() * triton_kernels.DIGITS.value)
    for shift in _SHIFTS:
        triton_kernels.count_digits[grid](*sweep, exact, bins, SHIFT=shift, BLOCK=BLOCK)
        triton_kernels.pick_digit[tensors](bins, exact, rank)
    ties = torch.zeros_like(blocks.owners)
    triton_kernels.count_ties[grid](*sweep, exact, ties, BLOCK=BLOCK)
    return ties, ties.cumsum(0)
