"""From a GPU's candidates to the selection, without a read by the host.

All sizes are known on the host; what depends on values stays on the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.kernels import trim_kernels as triton_kernels
from dgc.core.kernels.cuda_tables import BLOCK, Blocks, blocks_of
from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch


def target(count: int) -> int:
    """How many elements should reach the next threshold, so that seldom fewer than `count` do."""
    return 2 * count + 32


class Wanted(NamedTuple):
    """What is wanted of T tensors, and the buffers for their candidates; int64, on the device.

    Attributes:
        counts: how many of each tensor are selected, `[T]`.
        aims: `target` of that, at most all, `[T]`.
        capacities: candidates that each tensor's buffer holds, `[T]`.
        starts: where each buffer begins, `[T]`.
        edges: the same and the end of the last, `[T + 1]`.
        blocks: programs for the buffers' slots.
        total: C, on the host.
    """

    counts: Tensor
    aims: Tensor
    capacities: Tensor
    starts: Tensor
    edges: Tensor
    blocks: Blocks
    total: int


class Candidates(NamedTuple):
    """The elements that reached the thresholds of T tensors, in the buffers of `Wanted`.

    Attributes:
        places: int64 `[C]`, positions in the flat state; each tensor's first, in no order.
        values: float32 `[C]`.
        passed: how many of each tensor, int64 `[T]`.
    """

    places: Tensor
    values: Tensor
    passed: Tensor


class Ranked(NamedTuple):
    """The candidates of T tensors by magnitude.

    Attributes:
        ranked: int64 `[C]`, in each buffer where in `ordered` the largest is, the second, and so on.
        ordered: the values by place, then zeros, in each buffer; float32 `[C]`.
    """

    ranked: Tensor
    ordered: Tensor


def room(count: int, numel: int) -> int:
    """How many candidates the buffer of a tensor holds of which `count` are wanted."""
    return min(numel, 2 * target(count)) if count else 0


def trim(
    found: Candidates, wanted: Wanted, layout: Layout, counts: tuple[int, ...]
) -> tuple[SparseBatch, Ranked]:
    """The counts[t] largest candidates of each tensor, of equal ones the first."""
    device, slots = found.values.device, (*wanted.blocks[:3], wanted.starts)
    grid, total = (wanted.blocks.owners.numel(),), sum(counts)
    indices = torch.empty(total, dtype=torch.int64, device=device)
    values = torch.empty(total, device=device)
    ordered = torch.empty(wanted.total, device=device)
    batch = SparseBatch(indices, values, counts, layout.numels)
    if not total:
        return batch, Ranked(indices, ordered)
    narrow = torch.int32 if layout.offsets[-1] < 1 << 31 else torch.int64  # sorted in half the time
    keys = torch.empty(wanted.total, dtype=narrow, device=device)
    tensors = found.passed, layout.table
    triton_kernels.key_by_place[grid](*slots, *tensors, found.places, keys, BLOCK=BLOCK)
    places, order = keys.sort(stable=True)
    keys = torch.empty_like(order)
    triton_kernels.key_by_magnitude[grid](
        *(*slots, found.passed, order, found.values, ordered, keys), BLOCK=BLOCK
    )
    ranked = keys.argsort(stable=True)
    marks = torch.zeros(wanted.total, dtype=torch.int32, device=device)
    sent = blocks_of(counts, device)
    triton_kernels.mark[(sent.owners.numel(),)](
        *sent[:3], wanted.starts, ranked, marks, BLOCK=BLOCK
    )
    triton_kernels.take[grid](
        *(*slots, *tensors, places, ordered, marks, marks.cumsum(0), indices, values), BLOCK=BLOCK
    )
    return batch, Ranked(ranked, ordered)


def remember_(
    thresholds: Tensor, ranked: Ranked, passed: Tensor, wanted: Wanted, bad: Tensor
) -> None:
    """thresholds[t] ← what about target(counts[t]) elements of tensor t will reach next time.

    Args:
        thresholds: float32 `[T]`, overwritten.
        ranked: the candidates, as `trim` gives them.
        passed: how many of each tensor, int64 `[T]`.
        wanted: a count of 0 leaves the threshold.
        bad: int64 `[1]`; not 0 leaves all.
    """
    if wanted.total:
        triton_kernels.remember[(thresholds.numel(),)](
            *(thresholds, wanted.counts, wanted.capacities, wanted.starts, passed, *ranked, bad),
            enable_fp_fusion=False,
        )
