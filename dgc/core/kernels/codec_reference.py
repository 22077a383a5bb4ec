"""The message's body in plain Python and numpy: the definition, for tests; `codec_cpu` is the same.

Shapes: T tensors, K values in all. A body has four sections, all little-endian, bits from the
least significant up, each section filled up to whole bytes with zeros:

    parameters   T × (0, 1 or 2) uint16      levels of the quantiser
    low          K × r bits                  low bits of the gaps
    codes        K × value_bits bits         sign in the top bit, level below
    words        W × uint32                  the coder's state (high, low), then what it emitted

Rice coded (`dgc.core.rice`), the last section is, for each gap in turn, its quotient in zero bits
and a one bit.
Positions are indices into the T tensors laid end to end; the gap of the first is itself.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dgc.core.pack import PROBABILITY_BITS, STATE_LOW, gap_code
from dgc.core.quantize import MAX_FINITE, ZERO_LEVEL, levels
from dgc.core.rice import low_bits_of

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


SEARCH_BINS = 128
"""Resolution of the histogram that levels are fitted to."""
MAX_SEARCHED_LEVELS = 8
"""With more levels, from the smallest to the largest magnitude is good enough."""


class Status(IntEnum):
    """What a kernel found; anything but OK leaves its other results meaningless."""

    OK = 0
    PARAMETER = 1
    """A level would not be finite, or lo > hi."""
    VALUE = 2
    """A 32-bit value is not finite."""
    STATE = 3
    """The coder's first state is out of range."""
    EXHAUSTED = 4
    """The last section ended before the last index."""
    LEFT_OVER = 5
    """The last section goes on, or the coder's last state is not the one it starts from."""
    INDEX = 6
    """An index is not ascending or not inside its tensor."""
    FILL = 7
    """The bits that fill a section up are not zero."""


class Body(NamedTuple):
    """The four sections, uint8 each."""

    parameters: Bytes
    low: Bytes
    codes: Bytes
    words: Bytes


def encode(
    indices: Ints,
    values: Floats,
    counts: Ints,
    ends: Ints,
    code: int,
    value_bits: int,
    rice: bool = False,
) -> tuple[Body, Floats, Status]:
    """The body of a message, K ≥ 1, and float32 `[K]` what a receiver will make of its values.

    Args:
        indices: `[K]`, local to its tensor.
        values: `[K]`.
        counts: `[T]`.
        ends: `[T]`, cumulative numels.
        code: number of the gap code; with `rice` how many low bits.
        value_bits: width of a value code.
        rice: whether gaps are Rice coded.
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    starts = np.concatenate([[0], ends[:-1]])
    positions = indices + starts[owner]
    gaps = np.diff(positions, prepend=-1) - 1
    empty = Body(*[np.zeros(0, np.uint8)] * 4)
    if (gaps < 0).any() or (indices < 0).any() or (positions >= ends[owner]).any():
        return empty, np.zeros(0, np.float32), Status.INDEX
    if not np.isfinite(values).all():
        return empty, np.zeros(0, np.float32), Status.VALUE
    low_bits = low_bits_of(code, rice)
    quotients = [int(q) for q in gaps >> low_bits]
    parameters, codes = quantize(values, counts, value_bits)
    body = Body(
        parameters.astype("<u2").view(np.uint8).reshape(-1),
        pack_bits(gaps & ((1 << low_bits) - 1), low_bits),
        pack_bits(codes, value_bits),
        encode_unary(quotients) if rice else encode_quotients(quotients, gap_code(code).starts),
    )
    return body, dequantize(codes, parameters, counts, value_bits), Status.OK


def decode(
    body: Body, count: int, ends: Ints, code: int, value_bits: int, rice: bool = False
) -> tuple[Ints, Floats, Ints, Status]:
    """Positions int64 `[K]`, values float32 `[K]` and counts int64 `[T]` of a body.

    The sections have the lengths that `count`, `ends` and `value_bits` call for; their contents
    may be anything.
    """
    none = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64)
    low_bits = low_bits_of(code, rice)
    parameters = body.parameters.view("<u2").astype(np.int64).reshape(len(ends), -1)
    if not _valid_parameters(parameters):
        return *none, Status.PARAMETER
    low, low_fill = unpack_bits(body.low, count, low_bits)
    codes, code_fill = unpack_bits(body.codes, count, value_bits)
    if low_fill or code_fill:
        return *none, Status.FILL
    if rice:
        quotients, status = decode_unary(body.words, count)
    else:
        quotients, status = decode_quotients(body.words, count, gap_code(code).starts)
    if status is not Status.OK:
        return *none, status
    position, positions = -1, []
    for quotient, bits in zip(quotients, low, strict=True):
        position += (quotient << low_bits) + int(bits) + 1
        positions.append(position)
    if position >= (ends[-1] if len(ends) else 0):
        return *none, Status.INDEX
    where = np.array(positions, dtype=np.int64)
    counts = np.diff(np.searchsorted(where, ends), prepend=0)
    values = dequantize(codes, parameters, counts, value_bits)
    if not np.isfinite(values).all():
        return *none, Status.VALUE
    return where, values, counts, Status.OK


def pack_bits(symbols: Ints, width: int) -> Bytes:
    """Symbols of `width` bits, end to end, least significant bit first.

    Example:
        >>> pack_bits(np.array([1, 2, 3]), 3).tolist()  # 0b011_010_001
        [209, 0]
    """
    shifts = np.arange(width, dtype=np.int64)
    bits = (symbols[:, None] >> shifts) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def unpack_bits(section: Bytes, count: int, width: int) -> tuple[Ints, bool]:
    """The inverse of `pack_bits`, and whether a bit after the last symbol was set."""
    bits = np.unpackbits(section, bitorder="little").astype(np.int64)
    symbols = bits[: count * width].reshape(count, width) << np.arange(width, dtype=np.int64)
    return symbols.sum(axis=1), bool(bits[count * width :].any())


def encode_unary(quotients: list[int]) -> Bytes:
    """Zeros and a one for each quotient.

    Example:
        >>> encode_unary([0, 2, 5]).tolist()  # 1 001 000001, from the lowest bit up
        [9, 2]
    """
    bits = np.zeros(sum(quotients) + len(quotients), np.uint8)
    bits[np.cumsum(quotients) + np.arange(len(quotients))] = 1
    return np.packbits(bits, bitorder="little")


def decode_unary(section: Bytes, count: int) -> tuple[list[int], Status]:
    """The inverse of `encode_unary`; the last byte must hold the last one bit."""
    at = np.flatnonzero(np.unpackbits(section, bitorder="little"))
    if len(at) != count:
        return [], Status.EXHAUSTED if len(at) < count else Status.LEFT_OVER
    finished = count == 0 or at[-1] // 8 + 1 == len(section)
    quotients: list[int] = (np.diff(at, prepend=-1) - 1).tolist()
    return quotients, Status.OK if finished else Status.LEFT_OVER


def encode_quotients(quotients: list[int], starts: Ints) -> Bytes:
    """The words of an rANS coder; it works backwards, so that decoding works forwards.

    Example:
        >>> encode_quotients([0, 1], gap_code(8).starts).tolist()  # 3 bits: 8 · 2^31
        [4, 0, 0, 0, 0, 0, 1, 0]
    """
    table, escape = starts.tolist(), len(starts) - 2
    state, emitted = STATE_LOW, []
    for quotient in reversed(quotients):
        escapes, symbol = divmod(quotient, escape)
        for each in [symbol] + [escape] * escapes:
            start, frequency = table[each], table[each + 1] - table[each]
            if state >= frequency << (63 - PROBABILITY_BITS):
                emitted.append(state & 0xFFFFFFFF)
                state >>= 32
            state = (state // frequency << PROBABILITY_BITS) + state % frequency + start
    words = [state >> 32, state & 0xFFFFFFFF, *reversed(emitted)]
    return np.array(words, dtype="<u4").view(np.uint8)


def decode_quotients(section: Bytes, count: int, starts: Ints) -> tuple[list[int], Status]:
    """The inverse of `encode_quotients`, for a section of at least two words if `count` > 0."""
    words, table, escape = section.view("<u4").tolist(), starts.tolist(), len(starts) - 2
    state, used, quotient = words[0] << 32 | words[1], 2, 0
    quotients: list[int] = []
    if not STATE_LOW <= state < 1 << 63:
        return [], Status.STATE
    while len(quotients) < count:
        slot = state & ((1 << PROBABILITY_BITS) - 1)
        symbol = int(np.searchsorted(starts, slot, side="right")) - 1
        state = (table[symbol + 1] - table[symbol]) * (state >> PROBABILITY_BITS)
        state += slot - table[symbol]
        if state < STATE_LOW:
            if used == len(words):
                return [], Status.EXHAUSTED
            state, used = state << 32 | words[used], used + 1
        quotient += symbol
        if symbol < escape:
            quotients.append(quotient)
            quotient = 0
    finished = used == len(words) and state == STATE_LOW
    return quotients, Status.OK if finished else Status.LEFT_OVER


def quantize(values: Floats, counts: Ints, value_bits: int) -> tuple[Ints, Ints]:
    """Parameters int64 `[T, 0, 1 or 2]` and codes int64 `[K]`."""
    if value_bits == 32:
        return np.zeros((len(counts), 0), np.int64), values.view(np.uint32).astype(np.int64)
    runs = np.split(values, np.cumsum(counts)[:-1])
    fits = [_fit(np.abs(run), value_bits) for run in runs]
    codes = [
        _nearest(np.abs(run), levels(*fit, value_bits))
        | np.signbit(run).astype(np.int64) << (value_bits - 1)
        for run, fit in zip(runs, fits, strict=True)
    ]
    parameters = np.array(fits, np.int64).reshape(-1, 2)[:, : 1 if value_bits == 1 else 2]
    return parameters, np.concatenate(codes) if codes else np.zeros(0, np.int64)


def dequantize(codes: Ints, parameters: Ints, counts: Ints, value_bits: int) -> Floats:
    """float32 `[K]` the values that codes stand for."""
    if value_bits == 32:
        return codes.astype(np.uint32).view(np.float32)
    out = []
    for run, row in zip(np.split(codes, np.cumsum(counts)[:-1]), parameters, strict=True):
        magnitude = levels(int(row[0]), int(row[-1]), value_bits)
        size = magnitude[run & (len(magnitude) - 1)]
        out.append(np.where(run >> (value_bits - 1), -size, size))
    return np.concatenate(out).astype(np.float32) if out else np.zeros(0, np.float32)


def _valid_parameters(parameters: Ints) -> bool:
    lo, hi = parameters[:, :1], parameters[:, -1:]
    two = parameters.shape[1] == 2
    return bool(((lo & ~ZERO_LEVEL if two else lo) <= hi).all() and (hi <= MAX_FINITE).all())


def _nearest(magnitudes: Floats, table: Floats) -> Ints:
    """The nearest level: how many of the middles between two levels lie below, in float64."""
    wide = table.astype(np.float64)
    return np.searchsorted((wide[:-1] + wide[1:]) / 2, magnitudes.astype(np.float64))


def _fit(magnitudes: Floats, value_bits: int) -> tuple[int, int]:
    """The parameters of one tensor: its extremes, or what a search makes of them."""
    positive = magnitudes[magnitudes > 0]
    zero = ZERO_LEVEL if value_bits > 1 and 0 < len(positive) < len(magnitudes) else 0
    num_levels = (1 << (value_bits - 1)) - (zero != 0)
    if len(positive) == 0:
        return 0, 0
    if num_levels == 1:
        counted = positive if zero else magnitudes
        mean = np.float32(np.cumsum(counted.astype(np.float64))[-1] / len(counted))
        level = _upper(int(mean.view(np.uint32)))
        return level | zero, level
    low, high = int(positive.min().view(np.uint32)), int(positive.max().view(np.uint32))
    if len(positive) <= num_levels or num_levels > MAX_SEARCHED_LEVELS:
        return low >> 16 | zero, min((high + 0xFFFF) >> 16, MAX_FINITE)
    low, high = _search(positive, low, high, num_levels)
    return _upper(low) | zero, _upper(high)


def _upper(bits: int) -> int:
    return min((bits + 0x8000) >> 16, MAX_FINITE)


def _search(positive: Floats, low: int, high: int, num_levels: int) -> tuple[int, int]:
    """First and last level, as bits, of a small squared error: a pattern search from the extremes.

    Each end is moved by a step as long as that helps; then the step is halved. The error is taken
    from a histogram, not from the values.
    """
    shift = max(0, (high - low).bit_length() - SEARCH_BINS.bit_length() + 1)
    bins = (positive.view(np.uint32).astype(np.int64) - low) >> shift
    wide = positive.astype(np.float64)
    moments = [
        np.cumsum(np.bincount(bins, weights, SEARCH_BINS)).tolist()
        for weights in (np.ones_like(wide), wide, wide * wide)
    ]
    first, last, step = low, high, (high - low) // 4
    best = _error(moments, low, shift, first, last, num_levels)
    smallest = (high - low) // SEARCH_BINS
    while step > smallest:
        moved = False
        for up, down in ((step, 0), (0, step), (-step, 0), (0, -step)):
            if not low <= first + up <= last - down <= high:
                continue
            error = _error(moments, low, shift, first + up, last - down, num_levels)
            if error < best:
                best, first, last, moved = error, first + up, last - down, True
        if not moved:
            step //= 2
    return first, last


def _error(
    moments: list[list[float]], low: int, shift: int, first: int, last: int, num_levels: int
) -> float:
    """Σ (v − level)², each bin going as a whole to the level that is nearest to its start."""
    steps = np.arange(num_levels)
    bits = first + (last - first) * steps // (num_levels - 1)
    table = bits.astype(np.int32).view(np.float32).astype(np.float64)
    middle = ((table[:-1] + table[1:]) / 2).astype(np.float32).view(np.int32).astype(np.int64)
    error, seen = 0.0, (0.0, 0.0, 0.0)
    for level, border in zip(table.tolist(), [*middle.tolist(), 1 << 32], strict=True):
        index = min((border - low) >> shift, SEARCH_BINS) - 1
        upto = (
            (moments[0][index], moments[1][index], moments[2][index]) if index >= 0 else (0.0,) * 3
        )
        count, total, squares = (b - a for a, b in zip(seen, upto, strict=True))
        error += squares - 2 * level * total + level * level * count
        seen = upto
    return error
