"""The kernels on the CPU: which compiled loop runs over which part of the work, on how many threads.

The pass that updates the state collects candidates: what reaches a threshold that was guessed from
the previous step, or, without one, what is larger than the k largest so far. Where at least k of a
tensor's elements are collected, the k largest are among them, and only they have to be sorted out.
A tensor where fewer reach the guess gets a second pass over it alone, without one. So the result
is always that of `reference`, and the candidates are all the memory that is needed.
Shapes: T tensors, n elements in all; arrays in the plural are over the tensors. A bfloat16 state is
an int16 array.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgc.core.kernels import cpu_radix, cpu_steps, cpu_sweep, reference
from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch

Ints = NDArray[np.int64]
Bits = NDArray[np.int32]
Floats = NDArray[np.float32]
State = NDArray[np.float32] | NDArray[np.int16]

add_ = reference.add_  # so few elements are not worth a loop
scatter_add_ = reference.scatter_add_  # what messages hold goes through `codec_cpu.add_`

MIN_PART = 1 << 14
"""Elements under which another thread costs more than it gives."""
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
    pool, others = _pool(os.getpid()), []
    try:
        for a, b in pairwise(cuts[1:]):
            others.append(pool.submit(function, *args, a, b))
        first = function(*args, cuts[0], cuts[1])
    finally:
        _wait(others)  # they have addresses of memory that is freed once this has raised
    return [first, *(other.result() for other in others)]


def _wait(others: Sequence[Future[Any]]) -> None:
    """Until all have ended; what interrupts it is raised then."""
    interrupt: KeyboardInterrupt | None = None
    while not all(each.done() for each in others):
        try:
            wait(others)
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _edges(sizes: Sequence[int] | Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _addresses(grads: Sequence[Tensor]) -> Ints:
    return np.array([grad.data_ptr() for grad in grads], np.int64)


def _floats(thresholds: Tensor | None) -> Floats:
    return NO_FLOATS if thresholds is None else thresholds.numpy()


def _states(u: Tensor | None, v: Tensor) -> tuple[State, State]:
    """u and v as arrays; u empty if there is none."""
    return _raw(v[:0] if u is None else u), _raw(v)


def _raw(state: Tensor) -> State:
    return (state.view(torch.int16) if state.dtype == torch.bfloat16 else state).numpy()


class _Bucket(NamedTuple):
    """A flat state and what is wanted of it; `u` and `thresholds` are empty if there are none."""

    u: State
    v: State
    layout: Layout
    edges: Ints
    wanted: Ints
    targets: Ints
    thresholds: Floats

    @classmethod
    def of(
        cls,
        u: Tensor | None,
        v: Tensor,
        layout: Layout,
        counts: Sequence[int],
        thresholds: Tensor | None,
    ) -> "_Bucket":
        wanted = np.array(counts, np.int64)
        # So many candidates that a drift of the values from step to step rarely leaves under k.
        targets = np.where(wanted > 0, np.minimum(wanted + wanted // 2 + 32, layout.numels), 0)
        edges, known = layout.table.numpy(), _floats(thresholds)
        return cls(*_states(u, v), layout, edges, wanted, targets, known)


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
    grads: Sequence[Tensor],
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    seed: int = 0,
) -> bool:
    """As `reference.accumulate_`."""
    return accumulate_select_(grads, u, v, layout, update, [0] * len(grads), None, seed)[0]


def accumulate_select_(
    grads: Sequence[Tensor],
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    counts: Sequence[int],
    thresholds: Tensor | None,
    seed: int = 0,
) -> tuple[bool, SparseBatch]:
    """As `reference.accumulate_select_`; overwrites `thresholds`."""
    bucket = _Bucket.of(u, v, layout, counts, thresholds)
    addresses = _addresses(grads)
    work = int(bucket.edges[-1])
    # A pass of its own: once an element has been updated it cannot be restored to the bit.
    if not all(_split(cpu_sweep.all_finite, (addresses, bucket.edges), work, MIN_PART)):
        nothing = _Bucket.of(u, v, layout, [0] * len(counts), None)
        return False, _trim(nothing, _Candidates(NO_INTS, NO_FLOATS, nothing.wanted))
    found = _collect(bucket, _guessed(bucket), addresses, update.numpy(), seed)
    return True, _trim(bucket, found)


def select_(
    v: Tensor, layout: Layout, counts: Sequence[int], thresholds: Tensor | None
) -> SparseBatch:
    """As `reference.select_`; overwrites `thresholds`."""
    bucket = _Bucket.of(None, v, layout, counts, thresholds)
    return _trim(bucket, _collect(bucket, _guessed(bucket), NO_INTS, NO_ROWS, 0))


def release_(
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    batch: SparseBatch,
    sent: Tensor,
    seed: int = 0,
) -> Tensor | None:
    """As `reference.release_`."""
    edges = _edges(batch.counts)
    cleared = torch.empty(0 if u is None else int(edges[-1]), dtype=v.dtype)
    chosen = (batch.indices.numpy(), layout.table.numpy(), edges, sent.numpy())
    args = (*_states(u, v), *chosen, _raw(cleared), np.uint32(seed))
    _split(cpu_sweep.release, args, int(edges[-1]), MIN_PART)
    return None if u is None else cleared


def precondition_(
    grads: Sequence[Tensor], seconds: Sequence[Tensor], scales: Tensor, rows: Tensor
) -> bool:
    """As `reference.precondition_`."""
    edges, addresses, table = _edges([g.numel() for g in grads]), _addresses(grads), rows.numpy()
    work = int(edges[-1])
    # A pass of its own: once an element has been updated it cannot be restored to the bit.
    if not all(_split(cpu_steps.squares_finite, (addresses, edges, table), work, MIN_PART)):
        for grad in grads:
            grad.fill_(torch.nan)
        return False
    args = (addresses, _addresses(seconds), scales.numpy(), table, edges)
    _split(cpu_steps.precondition, args, work, MIN_PART)
    return True


def decay_(
    grads: Sequence[Tensor], params: Sequence[Tensor], buffers: Sequence[Tensor], rows: Tensor
) -> None:
    """As `reference.decay_`."""
    edges = _edges([grad.numel() for grad in grads])
    args = (*(_addresses(each) for each in (grads, params, buffers)), rows.numpy(), edges)
    _split(cpu_steps.decay, args, int(edges[-1]), MIN_PART)


def _guessed(bucket: _Bucket) -> Bits:
    """The thresholds, as bits: what is remembered; else 1, which all elements but zeros reach."""
    low = np.ones(bucket.wanted.size, np.int32)
    if bucket.thresholds.size:
        # A tensor that is wanted nearly whole passes whole, whatever its scale was.
        known = (bucket.thresholds > 0) & (bucket.targets < bucket.layout.numels)
        low[known] = bucket.thresholds.view(np.int32)[known]
    return low


def _collect(bucket: _Bucket, low: Bits, addresses: Ints, rows: Floats, seed: int) -> _Candidates:
    """Update all tensors, if there are gradients, and collect at least k candidates of each."""
    everything = (bucket.edges[:-1], bucket.edges[1:], bucket.edges)
    keeps = bucket.targets if bucket.thresholds.size else bucket.wanted
    states = (bucket.u, bucket.v)
    found = _sweep((addresses, *states, *everything, rows, low, keeps, np.uint32(seed)))
    few = np.flatnonzero((found.passed < bucket.wanted) & (low > 1))
    return _replaced(found, bucket, few) if few.size else found


def _sweep(args: tuple[Any, ...]) -> _Candidates:
    parts = _split(cpu_sweep.collect, args, int(args[5][-1]), MIN_PART)
    positions, values, passed = map(list, zip(*parts, strict=True))
    del parts
    return _Candidates(_joined(positions), _joined(values), np.sum(passed, axis=0))


def _joined(parts: list[Any]) -> Any:
    """The arrays end to end; empties the list, so that no part is held for longer than needed."""
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    parts.clear()
    return whole


def _replaced(found: _Candidates, bucket: _Bucket, few: Ints) -> _Candidates:
    """`found` with the tensors `few` collected anew, without a threshold."""
    starts, stops = bucket.edges[few], bucket.edges[few + 1]
    segments = (starts, stops, _edges(stops - starts))
    low = np.ones(few.size, np.int32)
    none = (NO_INTS, bucket.u[:0], bucket.v)
    again = _sweep((*none, *segments, NO_ROWS, low, bucket.targets[few], np.uint32(0)))
    passed = found.passed.copy()
    passed[few] = again.passed
    kept = ~np.isin(np.searchsorted(bucket.edges, found.positions, side="right") - 1, few)
    positions = np.concatenate([found.positions[kept], again.positions])
    values = np.concatenate([found.values[kept], again.values])
    order = np.argsort(positions)
    return _Candidates(positions[order], values[order], passed)


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
