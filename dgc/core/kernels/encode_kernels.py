"""Triton kernels that write a message's body; `codec_cuda` launches them.

docs/wire.md describes the bytes, `cuda_slots` the programs. Shapes: T tensors, K slots.

    held        K           whether a slot's value is sent
    counted     K           how many are sent up to a slot; the last is the number of values
    front       K           one more than the place of each value that is sent, in order
    refused     1           whether nothing is sent, for a gradient or value that is not finite
    starts      5           where parameters, low bits, codes and quotients begin, and the end
"""

from typing import Any

import triton
import triton.language as tl

from dgc.core.kernels.cuda_slots import magnitude_of, slots_of
from dgc.core.kernels.decode_kernels import CHECKSUM, INFINITE


@triton.jit  # type: ignore[untyped-decorator]
def hold(
    values: "Any",
    owners: "Any",
    firsts: "Any",
    counts: "Any",
    begins: "Any",
    finite: "Any",
    held: "Any",
    refused: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """held ← whether a value is not 0; refused ← 1 if one is not finite, or `finite` says so."""
    _, _, slot, inside = slots_of(owners, firsts, counts, begins, BLOCK)
    bits = magnitude_of(values, slot, inside)
    tl.store(held + slot, (bits > 0).to(tl.int32), mask=inside)
    if (tl.max(bits) >= INFINITE) | (tl.load(finite) == 0):
        tl.atomic_max(refused, 1)


@triton.jit  # type: ignore[untyped-decorator]
def move_front(
    indices: "Any",
    owners: "Any",
    firsts: "Any",
    counts: "Any",
    begins: "Any",
    offsets: "Any",
    held: "Any",
    counted: "Any",
    front: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """front ← the places that are held, and 1; offsets[t] is where tensor t begins."""
    t, _, slot, inside = slots_of(owners, firsts, counts, begins, BLOCK)
    inside = inside & (tl.load(held + slot, mask=inside, other=0) != 0)
    to = tl.load(counted + slot, mask=inside, other=1) - 1
    place = tl.load(offsets + t) + tl.load(indices + slot, mask=inside, other=0)
    tl.store(front + to, place + 1, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gaps(front: "Any", count: "Any", BLOCK: tl.constexpr) -> "Any":
    """The program's values among those that are sent, which there are, and their gaps; else 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(count)
    before = tl.load(front + at - 1, mask=inside & (at > 0), other=0)
    gap = tl.load(front + at, mask=inside, other=1) - before - 1
    return at, inside, tl.where(inside, gap, 0)


@triton.jit(do_not_specialize=["low_bits"], do_not_specialize_on_alignment=["count"])  # type: ignore[untyped-decorator]
def add_quotients(
    front: "Any", count: "Any", low_bits: "Any", quotients: "Any", BLOCK: tl.constexpr
) -> None:
    """Add the quotients of the program's gaps."""
    _, _, gap = _gaps(front, count, BLOCK)
    tl.atomic_add(quotients, tl.sum(gap >> low_bits))


@triton.jit(do_not_specialize=["low_bits", "room"], do_not_specialize_on_alignment=["count"])  # type: ignore[untyped-decorator]
def judge_room(
    count: "Any",
    low_bits: "Any",
    room: "Any",
    quotients: "Any",
    refused: "Any",
    fewer: "Any",
    scarce: "Any",
    exact: "Any",
    rank: "Any",
) -> None:
    """scarce[t] ← whether the indices exceed their room; then the fewer[t] largest are looked for."""
    t = tl.program_id(0)
    bits = tl.load(count) * (low_bits + 1) + tl.load(quotients)
    tl.store(scarce + t, ((bits > room) & (tl.load(refused) == 0)).to(tl.int64))
    tl.store(exact + t, bits * 0)
    tl.store(rank + t, tl.load(fewer + t))


@triton.jit  # type: ignore[untyped-decorator]
def hold_what_fits(
    values: "Any",
    owners: "Any",
    firsts: "Any",
    counts: "Any",
    begins: "Any",
    leads: "Any",
    refused: "Any",
    scarce: "Any",
    exact: "Any",
    rank: "Any",
    ties: "Any",
    tied: "Any",
    held: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """held ← whether a value is sent: all, where scarce[t] what exceeds exact[t], or none.

    Of those that equal it the first rank[t]: ties[b] are in block b, tied[b] up to its end. The others'
    slots are emptied.
    """
    b = tl.program_id(0)
    t, _, slot, inside = slots_of(owners, firsts, counts, begins, BLOCK)
    bits = magnitude_of(values, slot, inside)
    sent = (bits > 0) & (tl.load(refused) == 0)
    if tl.load(scarce + t) != 0:
        lead = tl.load(leads + b)
        before = tl.load(tied + b) - tl.load(ties + b) - tl.load(tied + lead) + tl.load(ties + lead)
        tie = inside & (bits == tl.load(exact + t))
        first = tie & (before + tl.cumsum(tie.to(tl.int32)) <= tl.load(rank + t))
        sent = sent & ((bits > tl.load(exact + t)) | first)
    tl.store(held + slot, sent.to(tl.int32), mask=inside)
    tl.store(values + slot, tl.full((BLOCK,), 0, tl.float32), mask=inside & (sent == 0))


@triton.jit(do_not_specialize=["low_bits", "slots"], do_not_specialize_on_alignment=["count"])  # type: ignore[untyped-decorator]
def split_gaps(
    front: "Any",
    count: "Any",
    low_bits: "Any",
    slots: "Any",
    low: "Any",
    bits: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """low ← the low bits of the gaps; bits ← how many bits their quotients take, then zeros."""
    at, inside, gap = _gaps(front, count, BLOCK)
    quotient = gap >> low_bits
    tl.store(low + at, gap - (quotient << low_bits), mask=inside)
    tl.store(bits + at, tl.where(inside, quotient + 1, 0), mask=at < slots)


@triton.jit(
    do_not_specialize=["head_bytes", "width", "low_bits"],
    do_not_specialize_on_alignment=["count", "ends"],
)  # type: ignore[untyped-decorator]
def begin(
    head: "Any",
    head_bytes: "Any",
    parameters: "Any",
    width: "Any",
    count: "Any",
    ends: "Any",
    low_bits: "Any",
    refused: "Any",
    message: "Any",
    starts: "Any",
    VALUE_BITS: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A block of the head, with what it says of the values, their number, and the parameters.

    These are `width` bytes; ends[0] is how many bits all quotients take.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(count)
    digits = number * 0 + 1
    for i in tl.static_range(1, 5):
        digits += (number >> (7 * i) > 0).to(tl.int64)
    some = number > 0
    fitted = head_bytes + digits
    low = fitted + tl.where(some, width, 0)
    codes = low + (number * low_bits + 7) // 8
    quotients = codes + (number * VALUE_BITS + 7) // 8
    end = quotients + (tl.load(ends) + 7) // 8
    tl.store(starts, fitted)
    tl.store(starts + 1, low)
    tl.store(starts + 2, codes)
    tl.store(starts + 3, quotients)
    tl.store(starts + 4, end)
    byte = tl.load(head + at, mask=at < head_bytes, other=0).to(tl.int64)
    byte = tl.where((at == 4) & (tl.load(refused) != 0), byte | NOT_FINITE, byte)
    byte = tl.where((at == 5) & some, low_bits, byte)
    length = (end + CHECKSUM) >> (8 * tl.minimum(tl.maximum(at - 6, 0), 7))
    byte = tl.where((at >= 6) & (at < 10), length & 0xFF, byte)
    tl.store(message + at, byte.to(tl.uint8), mask=at < head_bytes)
    digit = number >> (7 * tl.minimum(at, 8))
    digit = (digit & 0x7F) | tl.where(digit > 0x7F, 0x80, 0)
    tl.store(message + head_bytes + at, digit.to(tl.uint8), mask=at < digits)
    inside = some & (at < width)
    tl.store(message + fitted + at, tl.load(parameters + at, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["count", "start"])  # type: ignore[untyped-decorator]
def pack(
    symbols: "Any", count: "Any", width: "Any", start: "Any", message: "Any", BLOCK: tl.constexpr
) -> None:
    """Write the symbols of `width` bits each end to end, the lowest bit first, from `start` on."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(count) * width
    byte = at * 0
    for i in tl.static_range(8):
        bit = 8 * at + i
        symbol = bit // width
        word = tl.load(symbols + symbol, mask=bit < size, other=0)
        byte = byte | (((word >> (bit - symbol * width)) & 1) << i)
    tl.store(message + tl.load(start) + at, byte.to(tl.uint8), mask=8 * at < size)


@triton.jit(do_not_specialize_on_alignment=["count", "start"])  # type: ignore[untyped-decorator]
def place_ones(ends: "Any", count: "Any", start: "Any", words: "Any", BLOCK: tl.constexpr) -> None:
    """Set the last bit of each quotient; words are the message's, which has zeros there."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(count)
    bit = 8 * tl.load(start) + tl.load(ends + at, mask=inside, other=1) - 1
    tl.atomic_or(
        words + (bit >> 5), (tl.full((), 1, tl.int64) << (bit & 31)).to(tl.int32), mask=inside
    )


@triton.jit(do_not_specialize_on_alignment=["end"])  # type: ignore[untyped-decorator]
def finish(message: "Any", checksum: "Any", end: "Any") -> None:
    """The checksum, int64 `[1]`, behind the message's end."""
    at = tl.arange(0, 4)
    tl.store(message + tl.load(end) + at, (tl.load(checksum) >> (8 * at)).to(tl.uint8))
