"""From a GPU's candidates to the selection, in torch, without a read by the host.

All sizes are known on the host; what depends on values stays on the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch

MAGNITUDE = 0x7FFFFFFF
EVERYTHING = 1e-45
"""The smallest float32 above zero: a threshold that all elements but zeros reach."""


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
        total: C, on the host.
    """

    counts: Tensor
    aims: Tensor
    capacities: Tensor
    starts: Tensor
    edges: Tensor
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


def room(count: int, numel: int) -> int:
    """How many candidates the buffer of a tensor holds of which `count` are wanted."""
    return min(numel, 2 * target(count)) if count else 0


def owners_of(sizes: Tensor, total: int) -> Tensor:
    """Tensor t, sizes[t] times, for all t: int64 `[total]`; the host does not wait.

    Example:
        >>> owners_of(torch.tensor([2, 0, 1]), 3).tolist()
        [0, 0, 2]
    """
    tensors = torch.arange(sizes.numel(), device=sizes.device)
    return tensors.repeat_interleave(sizes, output_size=total)


def trim(
    found: Candidates, wanted: Wanted, layout: Layout, counts: tuple[int, ...]
) -> tuple[SparseBatch, Tensor]:
    """The counts[t] largest candidates of each tensor, of equal ones the first.

    Returns:
        The selection, counts[t] slots of each tensor; and the magnitudes of all candidates, each
        tensor's in its buffer from large to small, then zeros.
    """
    # What is no longer needed is let go: a sort takes several times the memory of what it sorts.
    owners = owners_of(wanted.capacities, wanted.total)
    filled = torch.arange(wanted.total, device=owners.device) - wanted.starts[owners]
    filled = filled < found.passed[owners]
    key = torch.where(filled, found.places, layout.table[owners + 1])
    places, order = key.sort(stable=True)
    owners, filled = owners[order], filled[order]
    values = found.values[order].where(filled, 0.0)
    del order
    key = (owners << 31).add_(MAGNITUDE).sub_(values.view(torch.int32) & MAGNITUDE)
    ranked = key.argsort(stable=True)
    del key
    chosen = ranked[_leading(wanted, sum(counts))]
    # Behind its tensor's elements, before those of the next.
    key = torch.where(filled[chosen], 2 * places[chosen] + 1, 2 * layout.table[owners[chosen] + 1])
    chosen = chosen[key.argsort(stable=True)]
    indices = (places[chosen] - layout.table[owners[chosen]]).where(filled[chosen], 0)
    return SparseBatch(indices, values[chosen], counts, layout.numels), values.abs()[ranked]


def _leading(wanted: Wanted, total: int) -> Tensor:
    """The first counts[t] places of each tensor's buffer, int64 `[total]`."""
    owners = owners_of(wanted.counts, total)
    firsts = wanted.counts.cumsum(0) - wanted.counts
    return torch.arange(total, device=owners.device) + (wanted.starts - firsts)[owners]


def remember_(
    thresholds: Tensor, ranked: Tensor, passed: Tensor, wanted: Wanted, finite: Tensor
) -> None:
    """thresholds[t] ← what about target(counts[t]) elements of tensor t will reach next time.

    Args:
        thresholds: float32 `[T]`, overwritten.
        ranked: magnitudes of the candidates, as `trim` gives them.
        passed: how many of each tensor, int64 `[T]`.
        wanted: a count of 0 leaves the threshold.
        finite: bool `[]`; False leaves all.
    """
    known = passed.minimum(wanted.capacities)
    at = wanted.starts + (2 * wanted.counts + 32).minimum(known) - 1
    # With fewer candidates than aimed at the next threshold is a little lower than the last.
    scale = torch.where(known >= 2 * wanted.counts + 32, 1.0, 0.98)
    found = ranked[at.clamp(0, ranked.numel() - 1)] * scale
    found = found.clamp(min=EVERYTHING).where(known >= wanted.counts, EVERYTHING)
    thresholds.copy_(found.where((wanted.counts > 0) & finite, thresholds))
