"""Triton kernels that read messages and add their values; `decode_torch` launches them.

docs/wire.md describes the bytes. Nothing is read outside a message, whatever its bytes are: sections
that do not fit into it count as a message of no values.
Shapes: P messages of `width` bytes, T tensors, K slots for the values of each.

    report      P × (bad, finite, number of values, T × used)
    sections    P × (low, codes, words, end, checksum, number of values), where bytes begin
    sums        P × (width ones in a byte of the quotients, K low bits of a gap), later their sums
"""

from typing import Any

import triton
import triton.language as tl

from dgc.core.quantize import MAX_FINITE as LARGEST
from dgc.core.quantize import ZERO_LEVEL as ZERO

# Triton looks names up while it compiles, those of annotations too, and may not find "Any".
MAX_FINITE, ZERO_LEVEL = tl.constexpr(LARGEST), tl.constexpr(ZERO)
INFINITE = tl.constexpr(0x7F800000)
FIXED, CHECKSUM, SECTIONS, REPORTED = (
    *(tl.constexpr(10), tl.constexpr(4)),
    *(tl.constexpr(6), tl.constexpr(3)),
)
NOT_ZERO = tl.constexpr(1 << 32)
"""Counted for a byte of the padding: no number of ones is as large."""


@triton.jit  # type: ignore[untyped-decorator]
def _bits(row: "Any", start: "Any", width: "Any", inside: "Any") -> "Any":
    """`width` ≤ 48 bits from bit `start` of a row on, as int64.

    Example: row 0x34 0x12, start 4, width 8: 0x23.
    """
    shift = start & 7
    found = start * 0
    for i in tl.static_range(7):
        byte = tl.load(row + (start >> 3) + i, mask=inside & (8 * i < shift + width), other=0)
        found = found | (byte.to(tl.int64) << (8 * i))
    return (found >> shift) & ((tl.full((), 1, tl.int64) << width) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _filling(row: "Any", end: "Any", bits: "Any") -> "Any":
    """What fills up the last byte of a section of so many bits. Example: 0b10110, 3 bits: 0b10."""
    over = bits & 7
    byte = tl.load(row + end - 1, mask=over > 0, other=0).to(tl.int64)
    return byte >> over


@triton.jit  # type: ignore[untyped-decorator]
def _ones(byte: "Any") -> "Any":
    """How many bits of a byte are set. Example: 0b1011 has 3."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


@triton.jit  # type: ignore[untyped-decorator]
def _owner(ends: "Any", position: "Any", num_tensors: "Any", LEVELS: tl.constexpr) -> "Any":
    """The tensor that holds a position: how many end at it or before.

    Example: ends = [3, 3, 8], position 3: tensor 2.
    """
    t = position * 0
    for level in tl.static_range(LEVELS):
        beyond = t + (1 << (LEVELS - 1 - level))
        exists = beyond <= num_tensors
        end = tl.load(ends + beyond - 1, mask=exists, other=0)
        t = tl.where(exists & (end <= position), beyond, t)
    return t


@triton.jit  # type: ignore[untyped-decorator]
def _parameters(row: "Any", t: "Any", inside: "Any", PARAMETER_BYTES: tl.constexpr) -> "Any":
    """lo and hi of tensor t, int64; of one bit hi is lo. `row` is where the parameters begin."""
    begin = 8 * PARAMETER_BYTES * t
    return (
        _bits(row, begin, 16, inside),
        _bits(row, begin + 8 * PARAMETER_BYTES - 16, 16, inside),
    )


@triton.jit(do_not_specialize=["width", "head_bytes", "num_tensors", "slots", "low_bits"])  # type: ignore[untyped-decorator]
def read_frames(
    messages: "Any",
    width: "Any",
    head: "Any",
    head_bytes: "Any",
    num_tensors: "Any",
    slots: "Any",
    low_bits: "Any",
    report: "Any",
    sections: "Any",
    NOT_FINITE: tl.constexpr,
    SOME_UNUSED: tl.constexpr,
    RICE: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    PARAMETER_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Check all of a message but quotients, checksum, padding and values; find its sections.

    `head` is a row of masks and one of the bytes up to the bitmap as they must be under them.
    """
    p = tl.program_id(0).to(tl.int64)
    row = messages + p * width
    lanes = tl.arange(0, BLOCK)
    flags = tl.load(row + 4).to(tl.int64)
    finite, some_unused = (flags & NOT_FINITE) == 0, (flags & SOME_UNUSED) != 0
    length = _bits(row, p * 0 + 48, 32, p >= 0)
    good = (length >= FIXED + CHECKSUM) & (length <= width)

    wrong = p * 0
    first = p * 0
    while first < head_bytes:
        inside = first + lanes < head_bytes
        byte = tl.load(row + first + lanes, mask=inside, other=0)
        mask = tl.load(head + first + lanes, mask=inside, other=0)
        expected = tl.load(head + head_bytes + first + lanes, mask=inside, other=0)
        wrong += tl.sum(((byte & mask) != expected).to(tl.int64))
        first += BLOCK
    good = good & (wrong == 0)

    out = report + p * (REPORTED + num_tensors)
    bitmap_bytes = (num_tensors + 7) // 8
    num_used, stray = p * 0, p * 0
    first = p * 0
    while first < 8 * bitmap_bytes:
        t = first + lanes
        at = head_bytes + t // 8
        byte = tl.load(row + at, mask=some_unused & (t < 8 * bitmap_bytes) & (at < width), other=0)
        bit = tl.where(some_unused, (byte.to(tl.int64) >> (t & 7)) & 1, 1)
        num_used += tl.sum(tl.where(t < num_tensors, bit, 0))
        stray += tl.sum(tl.where((t >= num_tensors) & some_unused, bit, 0))
        tl.store(out + REPORTED + t, bit, mask=t < num_tensors)
        first += BLOCK
    good = good & ((some_unused == 0) | ((stray == 0) & (num_used < num_tensors)))

    at = head_bytes + tl.where(some_unused, bitmap_bytes, 0).to(tl.int64)
    count, size, last, more = p * 0, p * 0, p * 0, p >= 0
    for i in tl.static_range(5):
        byte = tl.load(row + at + i, mask=at + i < width, other=0).to(tl.int64)
        count = tl.where(more, count | ((byte & 0x7F) << (7 * i)), count)
        last = tl.where(more, byte, last)
        size += more.to(tl.int64)
        more = more & (byte >= 0x80)
    at += size
    good = good & (more == 0) & ((last > 0) | (size == 1))
    good = good & (count <= slots) & (finite | (count == 0))
    good = good & (((flags & RICE) != 0) | (count == 0))
    good = good & (tl.load(row + 5) == tl.where(count > 0, low_bits, 0))

    end = length - CHECKSUM
    low = at + PARAMETER_BYTES * num_tensors
    codes = low + (count * low_bits + 7) // 8
    words = codes + (count * VALUE_BITS + 7) // 8
    fits = tl.where(count > 0, words + (count + 7) // 8 <= end, at == end)
    good = good & fits
    count = tl.where(good, count, 0)

    wrong = p * 0
    if PARAMETER_BYTES > 0:
        first = p * 0
        while first < num_tensors:
            t = first + lanes
            lo, hi = _parameters(row + at, t, (t < num_tensors) & (count > 0), PARAMETER_BYTES)
            if PARAMETER_BYTES == 4:
                lo = lo & (ZERO_LEVEL - 1)
            wrong += tl.sum(((lo > hi) | (hi > MAX_FINITE)).to(tl.int64))
            first += BLOCK
    # What fills up the low bits and the codes, and the byte of the last one bit.
    wrong += _filling(row, codes, count * low_bits) + _filling(row, words, count * VALUE_BITS)
    wrong += tl.load(row + end - 1, mask=count > 0, other=1) == 0
    good = good & (wrong == 0)

    tl.store(out, (good == 0).to(tl.int64))
    tl.store(out + 1, finite.to(tl.int64))
    tl.store(out + 2, count)
    # A message whose length is wrong is read as one of nothing but its first bytes.
    end = tl.where(good, end, FIXED)
    at = sections + p * SECTIONS
    tl.store(at, low)
    tl.store(at + 1, codes)
    tl.store(at + 2, tl.where(good & (count > 0), words, end))
    tl.store(at + 3, end)
    tl.store(at + 4, _bits(row, 8 * end, 32, p >= 0))
    tl.store(at + 5, tl.where(good, count, 0))


@triton.jit(do_not_specialize=["width", "slots", "low_bits"])  # type: ignore[untyped-decorator]
def measure(
    messages: "Any",
    width: "Any",
    slots: "Any",
    low_bits: "Any",
    sections: "Any",
    sums: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """What is to be summed: the ones of each byte of the quotients, and the low bits of each gap.

    Example: quotients in bytes 2 and 3 of four, 0x09 0x02; two gaps with low bits 5 and 1, a third
    slot empty: 0 0 2 1 5 1 0.
    """
    p = tl.program_id(1).to(tl.int64)
    row, at = messages + p * width, sections + p * SECTIONS
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(row + place, mask=place < width, other=0).to(tl.int64)
    words, end, count = tl.load(at + 2), tl.load(at + 3), tl.load(at + 5)
    quotient = (place >= words) & (place < end)
    padding = (place >= end + CHECKSUM) & (byte != 0)
    found = tl.where(quotient, _ones(byte), tl.where(padding, NOT_ZERO, 0))
    k = place - width
    held = (k >= 0) & (k < count)
    low = _bits(row, tl.where(held, 8 * tl.load(at) + k * low_bits, 0), low_bits, held)
    found = tl.where(held, low, found)
    tl.store(sums + p * (width + slots) + place, found, mask=k < slots)


@triton.jit  # type: ignore[untyped-decorator]
def _before(sums: "Any", place: "Any") -> "Any":
    """The sum of all before `place`."""
    return tl.load(sums + place - 1, mask=place > 0, other=0)


@triton.jit(do_not_specialize=["width", "slots"])  # type: ignore[untyped-decorator]
def place_ones(
    messages: "Any",
    width: "Any",
    slots: "Any",
    sections: "Any",
    sums: "Any",
    ones: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """ones[p, k] ← at which bit of the quotients the k-th one is. Example: 0x09 0x02: 0, 3, 9."""
    p = tl.program_id(1).to(tl.int64)
    row, at = messages + p * width, sections + p * SECTIONS
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(at + 2)
    inside = (place >= words) & (place < tl.load(at + 3))
    byte = tl.load(row + place, mask=inside, other=0).to(tl.int64)
    begin = p * (width + slots)
    k = tl.load(sums + begin + place, mask=inside, other=0) - _before(sums, begin) - _ones(byte)
    for i in tl.static_range(8):
        bit = (byte >> i) & 1
        to = ones + p * slots + k
        tl.store(to, (place - words) * 8 + i, mask=inside & (bit > 0) & (k < slots))
        k += bit


@triton.jit(do_not_specialize=["width", "slots", "low_bits", "num_tensors", "numel"])  # type: ignore[untyped-decorator]
def finish(
    messages: "Any",
    width: "Any",
    slots: "Any",
    low_bits: "Any",
    sections: "Any",
    sums: "Any",
    ones: "Any",
    checksums: "Any",
    ends: "Any",
    num_tensors: "Any",
    numel: "Any",
    report: "Any",
    positions: "Any",
    values: "Any",
    VALUE_BITS: tl.constexpr,
    PARAMETER_BYTES: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The position and the value of each slot; zeros where there is none.

    With q the quotients' sum, ones[k] − k, the position is q·2^r + low bits' sum + k.
    Example: gaps 3 and 36, r = 5: ones 0 and 2, low bits 3 and 4: 0 + 3 + 0 and 1·32 + 7 + 1.
    """
    p = tl.program_id(1).to(tl.int64)
    row, at = messages + p * width, sections + p * SECTIONS
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, codes, count = tl.load(at), tl.load(at + 1), tl.load(at + 5)
    begin, held = p * (width + slots), k < count
    total = _before(sums, begin + width) - _before(sums, begin)
    bad = (total != count) | (tl.load(checksums + p) != tl.load(at + 4))

    quotient = tl.load(ones + p * slots + k, mask=held, other=0) - tl.where(held, k, 0)
    outside = (quotient < 0) | (quotient > (numel >> low_bits))
    rest = tl.load(sums + begin + width + k, mask=held, other=0) - _before(sums, begin + width)
    position = (tl.where(outside, 0, quotient) << low_bits) + rest + k
    outside = held & (outside | (position >= numel))
    position = tl.where(held & (outside == 0), position, 0)
    bad = bad | (tl.sum(outside.to(tl.int64)) > 0)

    code = _bits(row, tl.where(held, 8 * codes + k * VALUE_BITS, 0), VALUE_BITS, held)
    sign, magnitude = code >> (VALUE_BITS - 1), code & ((1 << (VALUE_BITS - 1)) - 1)
    if VALUE_BITS == 32:
        bad = bad | (tl.max(magnitude) >= INFINITE)
    else:
        t = _owner(ends, position, num_tensors, LEVELS)
        parameters = row + low - PARAMETER_BYTES * num_tensors
        lo, hi = _parameters(parameters, t, held, PARAMETER_BYTES)
        zero = (lo & ZERO_LEVEL) >> 15
        lo = lo & (ZERO_LEVEL - 1)
        steps = tl.maximum((1 << (VALUE_BITS - 1)) - 1 - zero, 1)
        level = (lo << 16) + ((hi - lo) << 16) * (magnitude - zero) // steps
        magnitude = tl.where(magnitude < zero, 0, level)
    value = (magnitude | (sign << 31)).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(positions + p * slots + k, position, mask=k < slots)
    tl.store(values + p * slots + k, tl.where(held, value, 0.0), mask=k < slots)
    if bad:
        tl.atomic_max(report + p * (REPORTED + num_tensors), 1)


@triton.jit(do_not_specialize=["width", "runs", "stride"])  # type: ignore[untyped-decorator]
def checksum(
    data: "Any",
    width: "Any",
    runs: "Any",
    sizes: "Any",
    stride: "Any",
    near: "Any",
    far: "Any",
    found: "Any",
    RUN: tl.constexpr,
) -> None:
    """found[p] ^= what a run of the first sizes[p] bytes of row p counts, the last run ending there.

    The first four bytes are inverted, as CRC-32 begins with ones.
    """
    run, p = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, RUN)
    slot = tl.load(sizes + p * stride) + (run - runs) * RUN + column
    inside = (slot >= 0) & (slot < width)
    byte = tl.load(data + p * width + slot, mask=inside, other=0).to(tl.int64)
    byte = tl.where(inside & (slot < 4), byte ^ 0xFF, byte)
    total = tl.xor_sum(tl.load(near + column * 256 + byte), axis=0)
    bit = tl.arange(0, 32)
    spread = tl.load(far + run * 32 + bit) * ((total >> bit) & 1)
    tl.atomic_xor(found + p, tl.xor_sum(spread, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def clear(
    addresses: "Any", owners: "Any", firsts: "Any", numels: "Any", BLOCK: tl.constexpr
) -> None:
    """Set the float32 of a block to zero."""
    b = tl.program_id(0)
    t = tl.load(owners + b)
    at = tl.load(firsts + b) + tl.arange(0, BLOCK)
    to = tl.load(addresses + t).to(tl.pointer_type(tl.float32)) + at
    tl.store(to, tl.zeros([BLOCK], tl.float32), mask=at < tl.load(numels + t))


@triton.jit(
    do_not_specialize=["num_tensors"],
    do_not_specialize_on_alignment=["positions", "values", "count"],
)  # type: ignore[untyped-decorator]
def add_values(
    addresses: "Any",
    ends: "Any",
    num_tensors: "Any",
    scales: "Any",
    positions: "Any",
    values: "Any",
    count: "Any",
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add scales[t] · value to the float32 at each position, for the first `count` of them."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = k < tl.load(count)
    position = tl.load(positions + k, mask=held, other=0)
    t = _owner(ends, position, num_tensors, LEVELS)
    place = position - tl.load(ends + t - 1, mask=t > 0, other=0)
    to = tl.load(addresses + t, mask=held, other=0).to(tl.pointer_type(tl.float32)) + place
    scaled = tl.load(values + k, mask=held, other=0.0) * tl.load(scales + t, mask=held, other=0.0)
    tl.store(to, tl.load(to, mask=held, other=0.0) + scaled, mask=held)
