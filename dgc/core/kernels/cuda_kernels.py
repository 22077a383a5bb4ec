"""Triton kernels over the state of a bucket; `cuda` launches them.

Results equal those of `reference` bit for bit; that needs products and sums rounded one by one, so
launches forbid fused multiply-adds. A bfloat16 state is int16 here, the upper halves of float32.
A program works on BLOCK elements of one tensor: those of tensor owners[b] from firsts[b] on.
Shapes: T tensors, n elements, B blocks, K selected.
"""

from typing import Any

import triton
import triton.language as tl

from dgc.core.kernels import rounding

# Triton looks names up while it compiles, those of annotations too, and may not find "Any".
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
DIGITS = tl.constexpr(256)
U_BITS, V_BITS = tl.constexpr(rounding.U_BITS), tl.constexpr(rounding.V_BITS)


@triton.jit  # type: ignore[untyped-decorator]
def check(
    addresses: "Any", owners: "Any", firsts: "Any", numels: "Any", bad: "Any", BLOCK: tl.constexpr
) -> None:
    """bad ← 1 if the block holds inf or nan. Example: bits 0x7F800000 are inf."""
    b = tl.program_id(0)
    t = tl.load(owners + b)
    at = tl.load(firsts + b) + tl.arange(0, BLOCK)
    g = tl.load(addresses + t).to(tl.pointer_type(tl.float32))
    bits = tl.load(g + at, mask=at < tl.load(numels + t), other=0.0).to(tl.int32, bitcast=True)
    if tl.max(bits & MAGNITUDE) >= 0x7F800000:
        tl.atomic_max(bad, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _mixed(x: "Any") -> "Any":
    """`rounding.mixed` of uint32. Example: 1 becomes 1753845952."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def _load(state: "Any", place: "Any", inside: "Any") -> "Any":
    """The state at `place` as float32. Example: the half 0x3F81 is 1 + 2^-7."""
    value = tl.load(state + place, mask=inside, other=0)
    if state.dtype.element_ty == tl.int16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _store(state: "Any", place: "Any", value: "Any", inside: "Any", draw: "Any") -> "Any":
    """Store `value`, rounded if the state has halves, and return what was stored.

    Example: 0x3F80C000 becomes the half 0x3F81 where the low half of `draw` is 0x4000 or more.
    """
    if state.dtype.element_ty == tl.int16:
        half = (value.to(tl.int32, bitcast=True) + (draw & 0xFFFF).to(tl.int32)) >> 16
        tl.store(state + place, half.to(tl.int16), mask=inside)
        value = (half << 16).to(tl.float32, bitcast=True)
    else:
        tl.store(state + place, value, mask=inside)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _magnitude(state: "Any", place: "Any", inside: "Any") -> "Any":
    """|state| at `place` as bits, int64. Example: the half 0xBF81 is 0x3F810000."""
    return (_load(state, place, inside).to(tl.int32, bitcast=True) & MAGNITUDE).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _append(
    hit: "Any",
    place: "Any",
    value: "Any",
    t: "Any",
    edges: "Any",
    passed: "Any",
    where: "Any",
    what: "Any",
) -> None:
    """Write what is hit to the buffer of tensor t, as far as it has room, and count all of it.

    Example: edges = [0, 4], passed = [3], a block with two hits: the first goes to place 3, the
    second finds the buffer full, and passed becomes [5].
    """
    count = tl.sum(hit.to(tl.int32))
    if count > 0:
        slot = tl.load(edges + t) + tl.atomic_add(passed + t, count.to(tl.int64))
        slot += tl.cumsum(hit.to(tl.int32)) - 1  # within a block, in half the registers
        fits = hit & (slot < tl.load(edges + t + 1))
        tl.store(where + slot, place, mask=fits)
        tl.store(what + slot, value, mask=fits)


@triton.jit  # type: ignore[untyped-decorator]
def advance(
    addresses: "Any",
    u: "Any",
    v: "Any",
    owners: "Any",
    firsts: "Any",
    numels: "Any",
    offsets: "Any",
    rows: "Any",
    low: "Any",
    edges: "Any",
    passed: "Any",
    where: "Any",
    what: "Any",
    bad: "Any",
    seed: "Any",
    UPDATE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update a block, unless `bad`, and append what reaches low[t] to the buffer of its tensor."""
    if tl.load(bad) == 0:
        b = tl.program_id(0)
        t = tl.load(owners + b)
        at = tl.load(firsts + b) + tl.arange(0, BLOCK)
        inside = at < tl.load(numels + t)
        place = tl.load(offsets + t) + at
        value = _load(v, place, inside)
        if UPDATE:
            draw = _mixed(place.to(tl.uint32) ^ tl.load(seed).to(tl.uint32))
            g = tl.load(addresses + t).to(tl.pointer_type(tl.float32))
            row = rows + 4 * t
            entered = tl.load(g + at, mask=inside, other=0.0) * tl.load(row + 1)
            if MOMENTUM:
                momentum, nesterov = tl.load(row), tl.load(row + 3) != 0
                old = _load(u, place, inside)
                moved = tl.where(nesterov, momentum * (old + entered), momentum * old + entered)
                _store(u, place, moved, inside, draw >> U_BITS)
                entered = tl.where(nesterov, moved + entered, moved)
            value = value + entered * tl.load(row + 2)
            value = _store(v, place, value, inside, draw >> V_BITS)
        bits = value.to(tl.int32, bitcast=True) & MAGNITUDE
        hit = inside & (bits >= tl.load(low + t))
        _append(hit, place, value, t, edges, passed, where, what)


@triton.jit  # type: ignore[untyped-decorator]
def count_digits(
    v: "Any",
    owners: "Any",
    firsts: "Any",
    numels: "Any",
    offsets: "Any",
    again: "Any",
    prefix: "Any",
    bins: "Any",
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """bins[t] += how often each digit, eight bits from SHIFT on, follows prefix[t], if again[t].

    Example: SHIFT = 0, prefix[t] = 0x3F8000: 0x3F800007 counts in bin 7, 0x3F800107 nowhere.
    """
    b = tl.program_id(0)
    t = tl.load(owners + b)
    if tl.load(again + t) != 0:
        at = tl.load(firsts + b) + tl.arange(0, BLOCK)
        inside = at < tl.load(numels + t)
        bits = _magnitude(v, tl.load(offsets + t) + at, inside)
        follows = inside & ((bits >> (SHIFT + 8)) == tl.load(prefix + t))
        digit = tl.where(follows, (bits >> SHIFT) & (DIGITS - 1), 0).to(tl.int32)
        others = tl.sum((~follows).to(tl.int32))  # they are in bin 0
        bin = tl.arange(0, DIGITS)
        counts = tl.histogram(digit, DIGITS) - tl.where(bin == 0, others, 0)
        # Nearly all elements have a few exponents: one addition for each would wait for the next.
        tl.atomic_add(bins + t * DIGITS + bin, counts.to(tl.int64), mask=counts > 0)


@triton.jit  # type: ignore[untyped-decorator]
def pick_digit(bins: "Any", prefix: "Any", rank: "Any") -> None:
    """Append to prefix[t] the digit of the rank[t]-th largest, and lower rank[t] to its rank there.

    The bins are left zero. Example: bins 5 at digit 9 and 2 at digit 7, rank 6: digit 7, rank 1.
    """
    t = tl.program_id(0)
    digit = DIGITS - 1 - tl.arange(0, DIGITS)
    counts = tl.load(bins + t * DIGITS + digit)
    wanted = tl.load(rank + t)
    above = tl.cumsum(counts) < wanted
    # Beyond the last digit where there are fewer: such a tensor is not collected again.
    skipped = tl.minimum(tl.sum(above.to(tl.int64)), DIGITS - 1)
    tl.store(prefix + t, tl.load(prefix + t) * DIGITS + (DIGITS - 1 - skipped))
    tl.store(rank + t, wanted - tl.sum(tl.where(above, counts, 0)))
    tl.store(bins + t * DIGITS + digit, tl.zeros_like(counts))


@triton.jit  # type: ignore[untyped-decorator]
def count_ties(
    v: "Any",
    owners: "Any",
    firsts: "Any",
    numels: "Any",
    offsets: "Any",
    again: "Any",
    exact: "Any",
    ties: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """ties[b] ← how many of the block equal exact[t], if again[t]; else it is left alone."""
    b = tl.program_id(0)
    t = tl.load(owners + b)
    if tl.load(again + t) != 0:
        at = tl.load(firsts + b) + tl.arange(0, BLOCK)
        inside = at < tl.load(numels + t)
        bits = _magnitude(v, tl.load(offsets + t) + at, inside)
        tl.store(ties + b, tl.sum((inside & (bits == tl.load(exact + t))).to(tl.int32)))


@triton.jit  # type: ignore[untyped-decorator]
def collect(
    v: "Any",
    owners: "Any",
    firsts: "Any",
    numels: "Any",
    offsets: "Any",
    again: "Any",
    exact: "Any",
    rank: "Any",
    ties: "Any",
    counted: "Any",
    leads: "Any",
    edges: "Any",
    passed: "Any",
    where: "Any",
    what: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """Append what exceeds exact[t], and the first rank[t] that equal it, if again[t]; no zeros.

    ties[b] equal it in block b, counted[b] up to its end; leads[b] is its tensor's first block.
    """
    b = tl.program_id(0)
    t = tl.load(owners + b)
    if tl.load(again + t) != 0:
        at = tl.load(firsts + b) + tl.arange(0, BLOCK)
        inside = at < tl.load(numels + t)
        place = tl.load(offsets + t) + at
        value = _load(v, place, inside)
        bits = (value.to(tl.int32, bitcast=True) & MAGNITUDE).to(tl.int64)
        tie = inside & (bits == tl.load(exact + t))
        lead = tl.load(leads + b)
        before = tl.load(counted + b) - tl.load(ties + b)
        before -= tl.load(counted + lead) - tl.load(ties + lead)
        order = before + tl.cumsum(tie.to(tl.int32)) - 1
        hit = inside & (bits > tl.load(exact + t)) | (tie & (order < tl.load(rank + t)))
        hit = hit & (bits > 0)
        _append(hit, place, value, t, edges, passed, where, what)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def subtract(
    u: "Any",
    v: "Any",
    places: "Any",
    held: "Any",
    sent: "Any",
    count: "Any",
    seed: "Any",
    MASKING: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """v[place] ← v[place] − sent, and with MASKING u[place] ← 0, where `held` is not zero."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < count
    inside = inside & (tl.load(held + slot, mask=inside, other=0.0) != 0)
    place = tl.load(places + slot, mask=inside, other=0)
    draw = _mixed(place.to(tl.uint32) ^ tl.load(seed).to(tl.uint32))
    value = _load(v, place, inside) - tl.load(sent + slot, mask=inside, other=0.0)
    _store(v, place, value, inside, draw >> V_BITS)
    if MASKING:
        tl.store(u + place, tl.zeros_like(place).to(u.dtype.element_ty), mask=inside)
