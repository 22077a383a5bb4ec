"""Triton kernels from candidates to the selection and the next thresholds; `cuda_trim` launches them.

The candidates of tensor t lie in its buffer, from slot starts[t] on, the first passed[t] of
capacities[t] slots; `cuda_slots` describes the programs. Shapes: T tensors, C slots, K selected.
"""

from typing import Any

import triton
import triton.language as tl

from dgc.core.kernels.cuda_kernels import MAGNITUDE
from dgc.core.kernels.cuda_slots import slots_of

# Triton looks names up while it compiles, those of annotations too, and may not find "Any".
NOTHING = tl.constexpr(0x7FFFFFFF)
"""A threshold, as bits, that no element reaches."""


@triton.jit  # type: ignore[untyped-decorator]
def start(
    thresholds: "Any", counts: "Any", aims: "Any", numels: "Any", low: "Any", KNOWN: tl.constexpr
) -> None:
    """low[t] ← the bits that are to be reached: 1 lets all elements but zeros pass.

    A tensor that is wanted nearly whole passes whole, whatever its scale was.
    """
    t = tl.program_id(0)
    bits = tl.full((), 1, tl.int32)
    if KNOWN:
        known = tl.load(thresholds + t)
        use = (known > 0) & (tl.load(aims + t) < tl.load(numels + t))
        bits = tl.where(use, known.to(tl.int32, bitcast=True), bits)
    nothing = tl.full((), NOTHING, tl.int32)
    tl.store(low + t, tl.where(tl.load(counts + t) > 0, bits, nothing))


@triton.jit  # type: ignore[untyped-decorator]
def judge(
    low: "Any",
    counts: "Any",
    aims: "Any",
    capacities: "Any",
    bad: "Any",
    passed: "Any",
    again: "Any",
    exact: "Any",
    rank: "Any",
) -> None:
    """again[t] ← whether too few passed, or more than there is room for, unless `bad`.

    Such a tensor has nothing collected, and the search for the aims[t]-th largest begins.
    """
    t = tl.program_id(0)
    count, found = tl.load(counts + t), tl.load(passed + t)
    few = (found < count) & (tl.load(low + t) > 1)
    anew = (few | (found > tl.load(capacities + t))) & (tl.load(bad) == 0) & (count > 0)
    tl.store(again + t, anew.to(tl.int64))
    tl.store(exact + t, count * 0)
    tl.store(rank + t, tl.load(aims + t))
    tl.store(passed + t, tl.where(anew, 0, found))


@triton.jit  # type: ignore[untyped-decorator]
def key_by_place(
    owners: "Any",
    firsts: "Any",
    capacities: "Any",
    starts: "Any",
    passed: "Any",
    offsets: "Any",
    places: "Any",
    keys: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """Places of candidates; the end of the tensor in a slot that is not filled."""
    t, at, slot, inside = slots_of(owners, firsts, capacities, starts, BLOCK)
    filled = inside & (at < tl.load(passed + t))
    place = tl.load(places + slot, mask=filled, other=0)
    key = tl.where(filled, place, tl.load(offsets + t + 1))
    tl.store(keys + slot, key.to(keys.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def key_by_magnitude(
    owners: "Any",
    firsts: "Any",
    capacities: "Any",
    starts: "Any",
    passed: "Any",
    order: "Any",
    values: "Any",
    ordered: "Any",
    keys: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """The values in `order`, 0 in a slot that is not filled; keys rise as their magnitudes fall."""
    t, at, slot, inside = slots_of(owners, firsts, capacities, starts, BLOCK)
    filled = inside & (at < tl.load(passed + t))
    value = tl.load(values + tl.load(order + slot, mask=filled, other=0), mask=filled, other=0.0)
    tl.store(ordered + slot, value, mask=inside)
    size = value.to(tl.int32, bitcast=True) & MAGNITUDE
    tl.store(keys + slot, (t << 31) + (size ^ MAGNITUDE).to(tl.int64), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def mark(
    owners: "Any",
    firsts: "Any",
    counts: "Any",
    starts: "Any",
    ranked: "Any",
    marks: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """marks ← 1 at the first counts[t] of `ranked` of each tensor."""
    _, _, slot, inside = slots_of(owners, firsts, counts, starts, BLOCK)
    chosen = tl.load(ranked + slot, mask=inside, other=0)
    tl.store(marks + chosen, tl.full((BLOCK,), 1, tl.int32), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def take(
    owners: "Any",
    firsts: "Any",
    capacities: "Any",
    starts: "Any",
    passed: "Any",
    offsets: "Any",
    places: "Any",
    ordered: "Any",
    marks: "Any",
    counted: "Any",
    indices: "Any",
    values: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """What is marked, in order; counted[c] are the marks up to c. An unfilled slot has index 0."""
    t, at, slot, inside = slots_of(owners, firsts, capacities, starts, BLOCK)
    marked = inside & (tl.load(marks + slot, mask=inside, other=0) != 0)
    to = tl.load(counted + slot, mask=marked, other=1) - 1
    place = tl.load(places + slot, mask=marked, other=0).to(tl.int64)
    index = tl.where(at < tl.load(passed + t), place - tl.load(offsets + t), 0)
    tl.store(indices + to, index, mask=marked)
    tl.store(values + to, tl.load(ordered + slot, mask=marked, other=0.0), mask=marked)


@triton.jit  # type: ignore[untyped-decorator]
def remember(
    thresholds: "Any",
    counts: "Any",
    capacities: "Any",
    starts: "Any",
    passed: "Any",
    ranked: "Any",
    ordered: "Any",
    bad: "Any",
) -> None:
    """thresholds[t] ← what about 2·counts[t] + 32 elements of tensor t will reach next time.

    With fewer candidates than that it is a little lower than the last of them.
    """
    t = tl.program_id(0)
    count = tl.load(counts + t)
    known, wanted = tl.minimum(tl.load(passed + t), tl.load(capacities + t)), 2 * count + 32
    if (count > 0) & (tl.load(bad) == 0):
        last = tl.maximum(tl.minimum(wanted, known) - 1, 0)
        value = tl.abs(tl.load(ordered + tl.load(ranked + tl.load(starts + t) + last)))
        value = tl.where(known >= wanted, value, value * 0.98)
        bits = tl.maximum(value.to(tl.int32, bitcast=True), 1)
        bits = tl.where(known >= count, bits, 1)
        tl.store(thresholds + t, bits.to(tl.float32, bitcast=True))
