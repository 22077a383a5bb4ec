"""Compiled selection among candidates: the k-th largest magnitude by radix, and the trim to k."""

from typing import Any

import numpy as np

from dgc.core.kernels.compiled import kernel

MAGNITUDE = np.int32(0x7FFFFFFF)
BINS = 2048
EVERYTHING = np.array([1], np.int32)


@kernel
def kth_largest(bits: Any, rank: int) -> Any:
    """The `rank`-th largest of the int32 `bits`, each in [0, 2^31); overwrites `bits`.

    Eleven, ten and ten bits at a time, from the top; each level keeps the members of one bin.
    Example: [5, 9, 9, 1], rank 3: 5.
    """
    n = bits.size
    counts = np.zeros(BINS, np.int64)
    for shift in (20, 10, 0):
        mask = np.int32(2047 if shift == 20 else 1023)
        b = np.int32(0)
        for i in range(n):
            digit = (bits[i] >> shift) & mask
            counts[digit] += 1
            b = max(b, digit)
        while rank > counts[b]:
            rank -= counts[b]
            b -= 1
        kept = 0
        for i in range(n):
            bits[kept] = bits[i]
            kept += ((bits[i] >> shift) & mask) == b
        n = kept
        if n == 1:
            break
        counts[:1024] = 0
    return bits[0]


@kernel
def magnitudes(values: Any) -> Any:
    """The bits of `values` float32 without the sign, as a new int32 array."""
    bits = np.empty(values.size, np.int32)
    source = values.view(np.int32)
    for i in range(bits.size):
        bits[i] = source[i] & MAGNITUDE
    return bits


@kernel
def compact(where: Any, what: Any, begin: int, end: int, keep: int) -> Any:
    """Move the `keep` largest of the candidates [begin, end), of equal ones the first, to `begin`.

    The values of the others follow in any order, without their positions.

    Returns:
        Where they end, and the bits of the smallest one's magnitude.

    Example: values 2, -3, 2, 1, keep 2: 2, -3 come first and the bits of 2 are returned.
    """
    smallest = kth_largest(magnitudes(what[begin:end]), keep)
    bits, ties, n = what.view(np.int32), keep, begin
    for j in range(begin, end):
        ties -= (bits[j] & MAGNITUDE) > smallest
    for j in range(begin, end):
        magnitude = bits[j] & MAGNITUDE
        if magnitude > smallest or (magnitude == smallest and ties > 0):
            ties -= magnitude == smallest
            where[n] = where[j]
            what[n], what[j] = what[j], what[n]
            n += 1
    return n, smallest


@kernel
def _guess(candidates: Any, kept: Any, wanted: int, target: int) -> Any:
    """A threshold that about `target` such elements reach; `kept` are the largest candidates.

    The candidate of that rank, if there are so many. Otherwise the tail is continued as an
    exponential, x = b − s·ln(target/n), through the smallest kept and the smallest, b, of n. If
    fewer than `wanted` are there, no other element is above zero: every element above zero.
    """
    n = candidates.size
    if n < wanted:
        return EVERYTHING.view(np.float32)[0]
    if n >= target:
        bits = np.array([kth_largest(magnitudes(candidates), target)], np.int32)
        return bits.view(np.float32)[0]
    smallest = np.float64(np.abs(candidates).min())
    drop = 0.02 * smallest
    if n > kept.size:
        scale = (np.float64(np.abs(kept).min()) - smallest) / np.log(n / kept.size)
        drop = min(0.5 * smallest, scale * np.log(target / n))
    return np.float32(smallest - drop)


@kernel
def trim(
    where: Any,
    what: Any,
    edges: Any,
    starts: Any,
    wanted: Any,
    targets: Any,
    thresholds: Any,
    out_edges: Any,
    indices: Any,
    values: Any,
    lo: int,
    hi: int,
) -> None:
    """Of each segment's candidates keep the largest, of equal ones the first; for t in lo:hi.

    Args:
        where, what: positions in the flat state, ascending, and values of all candidates;
            overwritten.
        edges: int64 `[T+1]`, the candidates of segment t are edges[t] to edges[t+1].
        starts: int64 `[T]`, where segments begin.
        wanted, targets: int64 `[T]`: how many to keep, how many should pass the next threshold.
        thresholds: float32 `[T]`, overwritten, or empty: the thresholds of the next step.
        out_edges: int64 `[T+1]`, where each segment's selection goes.
        indices, values: overwritten: the selection, indices local to their segment.

    Example: candidates 2, 3, 2 at 10, 12, 15, start 10, wanted 2: indices 0, 2, values 2, 3.
    """
    for t in range(lo, hi):
        begin, end, out = edges[t], edges[t + 1], out_edges[t]
        count = out_edges[t + 1] - out
        if 0 < count < end - begin:
            compact(where, what, begin, end, count)
        for j in range(count):
            indices[out + j] = where[begin + j] - starts[t]
            values[out + j] = what[begin + j]
        if thresholds.size and wanted[t]:
            kept = values[out : out + count]
            thresholds[t] = _guess(what[begin:end], kept, wanted[t], targets[t])
