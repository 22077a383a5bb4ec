"""The kernels on the CPU: which compiled loop runs over which part of the work, on how many threads.

Thresholds guessed from the previous step collect candidates in the pass that updates the state.
Where at least k of a tensor's elements reach its threshold, the k largest are among them, and only
they are sorted out. A tensor where fewer do, or far more, gets an exact threshold and a second pass
over it alone. Either way the result is that of `reference`, and the candidates are all the memory
that is needed. Shapes: T tensors, n elements in all; arrays in the plural are over the tensors.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgc.core.kernels import cpu_radix, cpu_sweep
from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch

Ints = NDArray[np.int64]
Bits = NDArray[np.int32]
Floats = NDArray[np.float32]

MIN_PART = 1 << 14
"""Elements under which another thread costs more than it gives."""
LARGE = 1 << 18
"""Elements from which all threads search for the exact threshold of one tensor together."""
NO_FLOATS = np.empty(0, np.float32)
NO_INTS = np.empty(0, np.int64)
NO_ROWS = np.empty((0, 4), np.float32)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    # By process, because threads do not survive a fork.
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dgc")


def _split(function: Callable[..., Any], args: Sequence[Any], work: int, least: int) -> list[Any]:
    """function(*args, lo, hi) over [0, work) in even parts of `least` or more, one a thread."""
    parts = max(1, min(torch.get_num_threads(), work // least))
    cuts = [work * p // parts for p in range(parts + 1)]
    pool = _pool(os.getpid())
    others = [pool.submit(function, *args, a, b) for a, b in pairwise(cuts[1:])]
    return [function(*args, cuts[0], cuts[1]), *(other.result() for other in others)]


def _edges(sizes: Sequence[int] | Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _addresses(grads: Sequence[Tensor]) -> Ints:
    return np.array([grad.data_ptr() for grad in grads], np.int64)


def _floats(state: Tensor | None) -> Floats:
    return NO_FLOATS if state is None else state.numpy()


class _Bucket(NamedTuple):
    """A flat state and what is wanted of it; `thresholds` is empty if none are kept."""

    v: Floats
    layout: Layout
    edges: Ints
    wanted: Ints
    targets: Ints
    thresholds: Floats

    @classmethod
    def of(
        cls, v: Tensor, layout: Layout, counts: Sequence[int], thresholds: Tensor | None
    ) -> "_Bucket":
        wanted = np.array(counts, np.int64)
        # So many candidates that a drift of the values from step to step rarely leaves under k.
        targets = np.minimum(2 * wanted + 32, layout.numels)
        return cls(v.numpy(), layout, layout.table.numpy(), wanted, targets, _floats(thresholds))


class _Candidates(NamedTuple):
    """Elements that reached their threshold, ascending: where they are in v, and how many each."""

    positions: Ints
    values: Floats
    passed: Ints


def squared_norm(grads: Sequence[Tensor]) -> float:
    """As `reference.squared_norm`, rounded otherwise, the same for any number of threads."""
    edges = _edges([grad.numel() for grad in grads])
    sums = np.zeros(-(-int(edges[-1]) // cpu_sweep.SQUARES))
    _split(cpu_sweep.square_sums, (_addresses(grads), edges, sums), sums.size, 1)
    return float(sums.sum())


def accumulate_(
    grads: Sequence[Tensor], u: Tensor | None, v: Tensor, layout: Layout, update: Tensor
) -> bool:
    """As `reference.accumulate_`."""
    return accumulate_select_(grads, u, v, layout, update, [0] * len(grads), None)[0]


def accumulate_select_(
    grads: Sequence[Tensor],
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    counts: Sequence[int],
    thresholds: Tensor | None,
) -> tuple[bool, SparseBatch]:
    """As `reference.accumulate_select_`; overwrites `thresholds`."""
    bucket = _Bucket.of(v, layout, counts, thresholds)
    addresses = _addresses(grads)
    work = int(bucket.edges[-1])
    # A pass of its own: once an element has been updated it cannot be restored to the bit.
    if not all(_split(cpu_sweep.all_finite, (addresses, bucket.edges), work, MIN_PART)):
        nothing = _Bucket.of(v, layout, [0] * len(counts), None)
        return False, _trim(nothing, _Candidates(NO_INTS, NO_FLOATS, nothing.wanted))
    low = _guessed(bucket)
    found = _collect(bucket, low, addresses, _floats(u), update.numpy())
    return True, _trim(bucket, _repair(bucket, low, found))


def select_(
    v: Tensor, layout: Layout, counts: Sequence[int], thresholds: Tensor | None
) -> SparseBatch:
    """As `reference.select_`; overwrites `thresholds`."""
    bucket = _Bucket.of(v, layout, counts, thresholds)
    low = _guessed(bucket)
    found = _Candidates(NO_INTS, NO_FLOATS, np.zeros_like(bucket.wanted))
    if (low != cpu_sweep.NOTHING).any():
        found = _collect(bucket, low, NO_INTS, NO_FLOATS, NO_ROWS)
    return _trim(bucket, _repair(bucket, low, found))


def release_(u: Tensor | None, v: Tensor, layout: Layout, batch: SparseBatch, sent: Tensor) -> None:
    """As `reference.release_`."""
    edges = _edges(batch.counts)
    args = (_floats(u), v.numpy(), batch.indices.numpy(), layout.table.numpy(), edges, sent.numpy())
    _split(cpu_sweep.release, args, int(edges[-1]), MIN_PART)


def _guessed(bucket: _Bucket) -> Bits:
    """The thresholds, as bits, for the first pass: what is remembered, or nothing passes."""
    low = np.full(bucket.wanted.size, cpu_sweep.NOTHING, np.int32)
    if bucket.thresholds.size:
        known = (bucket.thresholds > 0) & (bucket.wanted > 0)
        low[known] = bucket.thresholds.view(np.int32)[known]
        # One that is wanted nearly whole passes whole, zeros excepted, whatever its scale.
        low[(bucket.targets == bucket.layout.numels) & (bucket.wanted > 0)] = 1
    return low


def _limits(bucket: _Bucket) -> Ints:
    return 8 * bucket.wanted + cpu_sweep.BLOCK


def _collect(bucket: _Bucket, low: Bits, addresses: Ints, u: Floats, rows: Floats) -> _Candidates:
    """Update all tensors, if there are gradients, and collect what reaches `low`."""
    starts, stops = bucket.edges[:-1], bucket.edges[1:]
    args = (addresses, u, bucket.v, starts, stops, bucket.edges, rows, low, bucket.wanted)
    return _joined(
        _split(cpu_sweep.collect, (*args, _limits(bucket)), int(bucket.edges[-1]), MIN_PART)
    )


def _joined(parts: Sequence[tuple[Ints, Floats, Ints]]) -> _Candidates:
    positions, values, passed = zip(*parts, strict=True)
    return _Candidates(np.concatenate(positions), np.concatenate(values), np.sum(passed, axis=0))


def _repair(bucket: _Bucket, low: Bits, found: _Candidates) -> _Candidates:
    """`found` with the tensors collected anew where too few passed, or too many to keep."""
    too_few = (found.passed < bucket.wanted) & (low > 1)
    bad = too_few | (found.passed > _limits(bucket))
    if not bad.any():
        return found
    again = _collect_exactly(bucket, np.flatnonzero(bad))
    passed = found.passed.copy()
    passed[bad] = again.passed
    good = ~bad[np.searchsorted(bucket.edges, found.positions, side="right") - 1]
    if not good.any():
        return again._replace(passed=passed)
    positions = np.concatenate([found.positions[good], again.positions])
    order = np.argsort(positions, kind="stable")
    values = np.concatenate([found.values[good], again.values])
    return _Candidates(positions[order], values[order], passed)


def _collect_exactly(bucket: _Bucket, tensors: Ints) -> _Candidates:
    """Between k and about 2k candidates of each of `tensors`, or all elements but zeros."""
    starts, stops = bucket.edges[tensors], bucket.edges[tensors + 1]
    low = np.ones(tensors.size, np.int32)
    small = np.flatnonzero(stops - starts < LARGE)
    ranks = bucket.targets[tensors]
    _split(cpu_radix.floors, (bucket.v, starts, stops, ranks, low, small), small.size, 1)
    for t in np.flatnonzero(stops - starts >= LARGE):
        limit = int(_limits(bucket)[tensors[t]])
        low[t] = _large_floor(bucket.v[starts[t] : stops[t]], int(ranks[t]), limit)
    edges = _edges(stops - starts)
    unlimited = np.full(tensors.size, np.iinfo(np.int64).max)
    segments = (NO_INTS, NO_FLOATS, bucket.v, starts, stops, edges, NO_ROWS)
    args = (*segments, low, bucket.wanted[tensors], unlimited)
    return _joined(_split(cpu_sweep.collect, args, int(edges[-1]), MIN_PART))


def _large_floor(v: Floats, rank: int, limit: int) -> int:
    """Bits that at least `rank` magnitudes reach, and at most `limit` others exceed."""
    above, prefix, prefix_shift = 0, 0, 31
    for shift in (20, 10, 0):
        args = (v, shift, prefix, prefix_shift)
        counts = sum(_split(cpu_sweep.histogram, args, v.size, MIN_PART))
        b, inside = cpu_radix.bin_of_rank(counts, rank - above)
        above = rank - inside
        prefix = b if shift == 20 else (prefix << 10) | (b & 1023)
        prefix_shift = shift
        if above + counts[b] <= limit:
            break
    return max(1, prefix << prefix_shift)


def _trim(bucket: _Bucket, found: _Candidates) -> SparseBatch:
    """The `wanted` largest of the candidates; the thresholds of the next step from them."""
    kept = np.minimum(found.passed, bucket.wanted)
    out = _edges(kept)
    indices, values = np.empty(out[-1], np.int64), np.empty(out[-1], np.float32)
    args = (found.positions, found.values, _edges(found.passed), bucket.edges, bucket.wanted)
    rest = (bucket.targets, bucket.thresholds, out, indices, values)
    _split(cpu_radix.trim, (*args, *rest), kept.size, 1)
    counts = tuple(kept.tolist())
    return SparseBatch(
        torch.from_numpy(indices), torch.from_numpy(values), counts, bucket.layout.numels
    )
