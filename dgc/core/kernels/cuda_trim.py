"""From a GPU's candidates to the selection, in torch, without a read by the host.

All sizes are known on the host; what depends on values stays on the device.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.kernels import reference
from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch

MAGNITUDE = 0x7FFFFFFF
EVERYTHING = 1e-45
"""The smallest float32 above zero: a threshold that all elements but zeros reach."""


def target(count: int) -> int:
    """How many elements should reach the next threshold, so that seldom fewer than `count` do."""
    return 2 * count + 32


class Candidates(NamedTuple):
    """The elements that reached the thresholds of T tensors.

    Attributes:
        places: int64 `[C]`, positions in the flat state; first all of tensor 0, in no order.
        values: float32 `[C]`.
        passed: how many of each tensor, length T.
    """

    places: Tensor
    values: Tensor
    passed: tuple[int, ...]


def uploaded(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`numbers` as int64 on `device`; the host does not wait for it."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def runs(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """starts[t], starts[t] + 1, … lengths[t] of them, for all t; int64 on `device`.

    Example:
        >>> runs([5, 9], [2, 1], torch.device("cpu")).tolist()
        [5, 6, 9]
    """
    shifts = [s - f for s, f in zip(starts, _firsts(lengths), strict=True)]
    sizes, total = uploaded(lengths, device), sum(lengths)
    shift = uploaded(shifts, device).repeat_interleave(sizes, output_size=total)
    return torch.arange(total, device=device) + shift


def trim(found: Candidates, layout: Layout, counts: Sequence[int]) -> tuple[SparseBatch, Tensor]:
    """The counts[t] largest candidates of each tensor, of equal ones the first.

    Returns:
        The selection; and the magnitudes of all candidates, each tensor's from large to small.
    """
    device, passed = found.places.device, found.passed
    owners = torch.arange(len(passed), device=device)
    owners = owners.repeat_interleave(uploaded(passed, device), output_size=sum(passed))
    places, order = found.places.sort()
    values = found.values[order]
    bits = values.view(torch.int32) & MAGNITUDE
    ranked = ((owners << 31) | (MAGNITUDE - bits.long())).argsort(stable=True)
    firsts = _firsts(passed)
    kept = [min(k, n) for k, n in zip(counts, passed, strict=True)]
    chosen = ranked[runs(firsts, kept, device)].sort().values
    indices = places[chosen] - layout.table[owners[chosen]]
    batch = SparseBatch(indices, values[chosen], tuple(kept), layout.numels)
    return batch, values.abs()[ranked]


def remember_(
    thresholds: Tensor, ranked: Tensor, passed: Sequence[int], counts: Sequence[int]
) -> None:
    """thresholds[t] ← what about target(counts[t]) elements of tensor t will reach next time.

    Args:
        thresholds: float32 `[T]`, overwritten.
        ranked: magnitudes of the candidates, as `trim` gives them.
        passed: how many of each tensor.
        counts: how many of each tensor were wanted; 0 leaves its threshold.
    """
    wanted = [t for t, (k, n) in enumerate(zip(counts, passed, strict=True)) if k and n >= k]
    aims = [min(target(counts[t]), passed[t]) for t in wanted]
    firsts = _firsts(passed)
    device = ranked.device
    at = uploaded([firsts[t] + aim - 1 for t, aim in zip(wanted, aims, strict=True)], device)
    # With fewer candidates than aimed at the next threshold is a little lower than the last.
    enough = uploaded(
        [aim == target(counts[t]) for t, aim in zip(wanted, aims, strict=True)], device
    )
    scale = torch.where(enough > 0, 1.0, 0.98)
    thresholds[uploaded(wanted, device)] = ranked[at] * scale
    few = [t for t, (k, n) in enumerate(zip(counts, passed, strict=True)) if k and n < k]
    thresholds[uploaded(few, device)] = EVERYTHING


def _firsts(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))[:-1]


def replace(
    batch: SparseBatch, v: Tensor, layout: Layout, counts: Sequence[int], tensors: Sequence[int]
) -> SparseBatch:
    """`batch` with `tensors` selected by `reference` instead; this is read by the host."""
    parts = batch.split()
    for t in tensors:
        flat = v[layout.offsets[t] : layout.offsets[t + 1]]
        alone = Layout.of([flat.numel()], v.device)
        parts[t] = reference.select_(flat, alone, [counts[t]], None).split()[0]
    return SparseBatch.cat(parts)


def restart_(
    thresholds: Tensor, v: Tensor, layout: Layout, counts: Sequence[int], tensors: Sequence[int]
) -> None:
    """thresholds[t] ← what target(counts[t]) elements of `v` reach now, for t in `tensors`."""
    for t in tensors:
        flat = v[layout.offsets[t] : layout.offsets[t + 1]]
        aim = min(target(counts[t]), flat.numel())
        thresholds[t] = torch.topk(flat.abs(), aim).values[-1].clamp(min=EVERYTHING)
