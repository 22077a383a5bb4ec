"""Compiled loops over the elements of a bucket: finite check, update, collection, release.

Work is a list of segments, `starts[t]` to `stops[t]` of the flat state; `edges[t]` counts the
elements of the segments before t. A call does the part of that work from `lo` to `hi`, so that
threads share it evenly. Magnitudes are compared as the bits of float32 without the sign: they
sort like the values, and neither nan nor a flushed denormal can upset them.
"""

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from dgc.core.kernels.compiled import kernel, reassociating

# The disk cache of a kernel here does not notice a change in these: delete it after one.
from dgc.core.kernels.cpu_radix import MAGNITUDE, compact
from dgc.core.kernels.cpu_state import close, lessen, opened

BLOCK = 1024
"""Elements updated and then searched while they are in the first-level cache."""
RUN = 64
"""Elements counted at once; only runs with a hit are searched one by one."""
SQUARES = 1 << 16
"""Elements whose squares are summed on their own, so that threads do not change the rounding."""
INFINITE = np.int32(0x7F800000)


def _pointer(typing: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


_as_pointer: Any = intrinsic(_pointer)


@kernel
def tensor_at(address: int, first: int, last: int) -> Any:
    """The float32 elements [first, last) of the tensor whose data starts at `address`."""
    return carray(_as_pointer(np.int64(address + 4 * first)), (last - first,), np.float32)


@kernel
def _bounds(starts: Any, stops: Any, edges: Any, t: int, lo: int, hi: int) -> Any:
    """Where the part [lo, hi) of the work begins and ends in the flat state within segment t."""
    shift = starts[t] - edges[t]
    return max(starts[t], lo + shift), min(stops[t], hi + shift)


@kernel
def first_segment(edges: Any, lo: int) -> Any:
    """The segment that holds element `lo` of the work. Example: edges [0, 3, 5], lo = 3: 1."""
    return np.searchsorted(edges, lo, side="right") - 1


@kernel
def block_max(bits: Any) -> Any:
    """The largest magnitude, as bits."""
    top = np.int32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & MAGNITUDE)
    return top


@kernel
def all_finite(addresses: Any, edges: Any, lo: int, hi: int) -> bool:
    """Whether no element in the part is inf or nan. Example: bits 0x7F800000 are inf: False."""
    t = first_segment(edges, lo)
    while t < addresses.size and edges[t] < hi:
        first = max(lo, edges[t]) - edges[t]
        last = min(hi, edges[t + 1]) - edges[t]
        if block_max(tensor_at(addresses[t], first, last).view(np.int32)) >= INFINITE:
            return False
        t += 1
    return True


@reassociating
def _block_square_sum(values: Any) -> float:
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


@kernel
def square_sums(addresses: Any, edges: Any, sums: Any, lo: int, hi: int) -> None:
    """sums[b] ← Σ g² in float64 over block b of `SQUARES` elements of the work, for b in lo:hi.

    Example: gradients [3], [4] lie in block 0: sums[0] = 25.
    """
    for b in range(lo, hi):
        begin, end = b * SQUARES, min((b + 1) * SQUARES, edges[-1])
        t, total = first_segment(edges, begin), 0.0
        while t < addresses.size and edges[t] < end:
            first = max(begin, edges[t]) - edges[t]
            last = min(end, edges[t + 1]) - edges[t]
            total += _block_square_sum(tensor_at(addresses[t], first, last))
            t += 1
        sums[b] = total


@kernel
def _update(g: Any, u: Any, v: Any, row: Any) -> None:
    momentum, gain, lr = row[0], row[1], row[2]
    if row[3] != 0:
        for i in range(g.size):
            entered = gain * g[i]
            moved = momentum * (u[i] + entered)
            u[i] = moved
            v[i] = v[i] + lr * (moved + entered)
    else:
        for i in range(g.size):
            moved = momentum * u[i] + gain * g[i]
            u[i] = moved
            v[i] = v[i] + lr * moved


@kernel
def _update_plain(g: Any, v: Any, row: Any) -> None:
    gain, lr = row[1], row[2]
    for i in range(g.size):
        v[i] = v[i] + lr * (gain * g[i])


@kernel
def _enter(g: Any, u: Any, v: Any, block: Any, first: int, row: Any, seed: Any, spare: Any) -> None:
    """Update from `first` on with the gradient `g`; `block` is v there."""
    if u.size:
        moved = opened(u, first, first + g.size, spare)
        _update(g, moved, block, row)
        close(moved, u, block, v, first, seed)
    else:
        _update_plain(g, block, row)
        close(spare[:0], u, block, v, first, seed)


@kernel
def _hits(bits: Any, low: Any) -> Any:
    count = np.int32(0)
    for i in range(bits.size):
        count += np.int32((bits[i] & MAGNITUDE) >= low)
    return count


@kernel
def _search(v: Any, at: int, first: int, low: Any, where: Any, what: Any, n: int, most: int) -> Any:
    """Append the elements of block `v` from `at` on whose magnitude has at least the bits `low`.

    Stops after a run that fills the buffers beyond `most`. Example: v = [2, -3, 1], at = 0,
    first = 10, low = bits of 2: positions 10 and 11 are appended.

    Returns:
        How many the buffers hold now, and where to go on.
    """
    bits = v.view(np.int32)
    while at < v.size and n <= most:
        run = bits[at : at + RUN]
        if _hits(run, low):
            for i in range(run.size):
                if (run[i] & MAGNITUDE) >= low:
                    where[n] = first + at + i
                    what[n] = v[at + i]
                    n += 1
        at += RUN
    return n, at


@kernel
def _room(starts: Any, stops: Any, edges: Any, keeps: Any, lo: int, hi: int) -> int:
    """How many candidates the buffers of the part must hold at most."""
    t, room = first_segment(edges, lo), 0
    while t < starts.size and edges[t] < hi:
        begin, end = _bounds(starts, stops, edges, t, lo, hi)
        if keeps[t]:
            room += min(2 * (keeps[t] + RUN), end - begin)
        t += 1
    return room


@kernel
def collect(
    addresses: Any,
    u: Any,
    v: Any,
    starts: Any,
    stops: Any,
    edges: Any,
    rows: Any,
    low: Any,
    keeps: Any,
    seed: Any,
    lo: int,
    hi: int,
) -> Any:
    """Update the part with the gradients, where there are any, and collect what reaches `low`.

    Whenever more than 2·keep + RUN elements of a segment are held, all but the `keep` largest are
    dropped, and from there on only larger ones than the smallest of these pass. So the `keep`
    largest of what reaches `low` are always among those returned, and memory is bounded.

    Args:
        addresses: int64 `[T]`, where each gradient lies, or `[0]` for no update.
        u, v: float32 or, for bfloat16, int16: the flat state; u is empty if there is none.
        starts, stops, edges: int64, the segments.
        rows: float32 `[T, 4]`, the update.
        low: int32 `[T]`, the bits of the thresholds, at least 1.
        keeps: int64 `[T]`, 0 to collect nothing.
        seed: uint32, of the rounding.

    Returns:
        Positions in the flat state, ascending; their values; how many of each segment.
    """
    passed = np.zeros(starts.size, np.int64)
    spare_u, spare_v = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    # Pages that no candidate reaches are never written, so they take no memory.
    room = _room(starts, stops, edges, keeps, lo, hi)
    where, what, n = np.empty(room, np.int64), np.empty(room, np.float32), 0
    t = first_segment(edges, lo)
    while t < starts.size and edges[t] < hi:
        begin, end = _bounds(starts, stops, edges, t, lo, hi)
        before, keep, floor = n, keeps[t], low[t]
        for first in range(begin, end, BLOCK):
            last = min(first + BLOCK, end)
            block = opened(v, first, last, spare_v)
            if addresses.size:
                g = tensor_at(addresses[t], first - starts[t], last - starts[t])
                _enter(g, u, v, block, first, rows[t], seed, spare_u)
            at = 0 if keep else BLOCK
            while at < block.size:
                most = before + 2 * keep + RUN
                n, at = _search(block, at, first, floor, where, what, n, most)
                if n > most:
                    n, smallest = compact(where, what, before, n, keep)
                    # Of equal magnitudes the first are kept, so a later one is of no use.
                    floor = np.int32(smallest + 1)
        passed[t] = n - before
        t += 1
    return where[:n], what[:n], passed


@kernel
def release(
    u: Any,
    v: Any,
    indices: Any,
    starts: Any,
    edges: Any,
    sent: Any,
    cleared: Any,
    seed: Any,
    lo: int,
    hi: int,
) -> None:
    """v[S] ← v[S] − sent, cleared ← u[S], u[S] ← 0 for entries lo to hi of the selection.

    u and `cleared` may both be empty. Entry j lies in the tensor t with
    edges[t] ≤ j < edges[t + 1], at starts[t] + indices[j].
    """
    t = first_segment(edges, lo)
    for j in range(lo, hi):
        while j >= edges[t + 1]:
            t += 1
        at = starts[t] + indices[j]
        lessen(v, at, sent[j], seed)
        if u.size:
            cleared[j] = u[at]
            u[at] = 0
