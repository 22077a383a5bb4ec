"""The message's body, compiled: the same bytes and values as `codec_reference`, which defines them.

One loop over all values of a message, whatever the number of tensors. See `codec_reference` for
the sections and shapes.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dgc.core.kernels.codec_fit import encode_values
from dgc.core.kernels.codec_reference import Body, Floats, Ints, Status
from dgc.core.kernels.compiled import kernel
from dgc.core.kernels.cpu import MIN_PART
from dgc.core.kernels.cpu import _pool as thread_pool
from dgc.core.kernels.cpu import _split as in_parts
from dgc.core.kernels.cpu_sweep import tensor_at
from dgc.core.pack import PROBABILITY_BITS, STATE_LOW, gap_code, max_code_bits
from dgc.core.quantize import MAX_FINITE, ZERO_LEVEL, parameter_bytes
from dgc.core.rice import low_bits_of

T = TypeVar("T")
R = TypeVar("R")

# Plain integers for the compiler.
OK, PARAMETER, VALUE, STATE, EXHAUSTED, LEFT_OVER, INDEX, FILL = (int(each) for each in Status)
INFINITE = 0x7F800000
BLOCK = 1 << 14
"""Elements that are set to zero and added to while they are in the cache."""
SLOT = (1 << PROBABILITY_BITS) - 1
RENORM = 63 - PROBABILITY_BITS


def encode(
    indices: Ints, values: Floats, counts: Ints, ends: Ints, code: int, value_bits: int
) -> tuple[Body, Floats, Status]:
    """As `codec_reference.encode`."""
    count, num_tensors = len(indices), len(counts)
    gap = gap_code(code)
    parameters = np.zeros((num_tensors, 2), np.uint16)
    low = np.empty(-(-count * gap.low_bits // 8), np.uint8)
    codes = np.empty(-(-count * value_bits // 8), np.uint8)
    words = np.empty(3 + max_code_bits(code, int(ends[-1]), count) // 32, "<u4")
    decoded = np.empty(count, np.float32)
    quotients = np.empty(count, np.int64)
    status = _encode_gaps(indices, counts, ends, gap.low_bits, low, quotients)
    if status == OK:
        status = encode_values(values, counts, value_bits, parameters, codes, decoded)
    if status != OK:
        return Body(*[low[:0]] * 4), decoded[:0], Status(status)
    first = _encode_quotients(quotients, gap.starts, words)
    kept = parameters[:, : parameter_bytes(value_bits) // 2].astype("<u2")
    body = Body(kept.reshape(-1).view(np.uint8), low, codes, words[first:].view(np.uint8))
    return body, decoded, Status.OK


def decode(
    body: Body, count: int, ends: Ints, code: int, value_bits: int, rice: bool = False
) -> tuple[Ints, Floats, Ints, Status]:
    """As `codec_reference.decode`."""
    positions, values = np.empty(count, np.int64), np.empty(count, np.float32)
    counts = np.zeros(len(ends), np.int64)
    low_bits = low_bits_of(code, rice)
    parameters = np.zeros((len(ends), 2), np.int64)
    width = parameter_bytes(value_bits) // 2
    if width:
        parameters[:] = body.parameters.view("<u2").reshape(-1, width)[:, [0, -1]]
    most = int(ends[-1]) >> low_bits
    if rice:
        status = _decode_unary(body.words, most, positions)
    else:
        # Copied, because a section may begin at an odd address.
        words = body.words.copy().view("<u4")
        status = _decode_quotients(words, gap_code(code).starts, most, positions)
    if status == OK:
        status = _decode_positions(body.low, low_bits, ends, positions, counts)
    if status == OK:
        status = _decode_values(body.codes, parameters, counts, value_bits, values)
    return positions, values, counts, Status(status)


def set_mean_(
    positions: Ints,
    values: Floats,
    edges: Ints,
    ends: Ints,
    grads: Sequence[Tensor],
    scales: Floats,
) -> None:
    """grads[t] ← scales[t] · the sum of the values of message after message, zero elsewhere.

    Args:
        positions, values: `[K]` of all messages, end to end.
        edges: `[P + 1]`, where each message begins and ends.
        ends: `[T]`, cumulative numels of `grads`.
        grads: T contiguous float32 tensors on the CPU, overwritten.
        scales: `[T]`.
    """
    addresses = np.array([grad.data_ptr() for grad in grads], np.int64)
    work = int(ends[-1]) if len(ends) else 0
    in_parts(set_mean, (positions, values, edges, ends, addresses, scales), work, MIN_PART)


def each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """[function(item) for item in items], on torch's threads if there are several of both."""
    if len(items) < 2 or torch.get_num_threads() < 2:
        return [function(item) for item in items]
    return list(thread_pool(os.getpid()).map(function, items))


@kernel
def _encode_gaps(
    indices: Any, counts: Any, ends: Any, low_bits: Any, low: Any, quotients: Any
) -> Any:
    """Low bits are packed, quotients returned. Index 5 after 1, low_bits 1: gap 3, low 1, q 1."""
    previous, j, at = np.int64(-1), 0, 0
    pending, held = np.int64(0), 0
    for t in range(counts.size):
        start = np.int64(0) if t == 0 else ends[t - 1]
        for _ in range(counts[t]):
            index = indices[j]
            position = start + index
            if index < 0 or position <= previous or position >= ends[t]:
                return INDEX
            gap = position - previous - 1
            previous = position
            quotients[j] = gap >> low_bits
            pending |= (gap & ((np.int64(1) << low_bits) - 1)) << held
            held += low_bits
            while held >= 8:
                low[at] = pending & 0xFF
                pending >>= 8
                held -= 8
                at += 1
            j += 1
    if held > 0:
        low[at] = pending
    return OK


@kernel
def _encode_quotients(quotients: Any, starts: Any, words: Any) -> Any:
    """Fill `words` from its end; returns where the stream begins. See the reference's example."""
    escape = starts.size - 2
    state, at = np.int64(STATE_LOW), words.size
    for j in range(quotients.size - 1, -1, -1):
        escapes = quotients[j] // escape
        symbol = quotients[j] - escapes * escape
        while True:
            start = starts[symbol]
            frequency = starts[symbol + 1] - start
            if state >= frequency << RENORM:
                at -= 1
                words[at] = state & 0xFFFFFFFF
                state >>= 32
            high = state // frequency
            state = (high << PROBABILITY_BITS) + (state - high * frequency) + start
            if escapes == 0:
                break
            escapes -= 1
            symbol = escape
    words[at - 1] = state & 0xFFFFFFFF
    words[at - 2] = state >> 32
    return at - 2


@kernel
def _decode_quotients(words: Any, starts: Any, most: Any, quotients: Any) -> Any:
    """The inverse of `_encode_quotients`; a quotient above `most` is refused."""
    escape = np.int64(starts.size - 2)
    symbols = np.empty(1 << PROBABILITY_BITS, np.uint8)
    for filled in range(escape + 1):
        symbols[starts[filled] : starts[filled + 1]] = filled
    state = np.int64(words[0]) << 32 | np.int64(words[1])
    if state < STATE_LOW:
        return STATE
    used = 2
    for j in range(quotients.size):
        symbol: Any = escape
        quotient = np.int64(0)
        while symbol == escape:
            slot = state & SLOT
            symbol = np.int64(symbols[slot])
            start = starts[symbol]
            state = (starts[symbol + 1] - start) * (state >> PROBABILITY_BITS) + slot - start
            if state < STATE_LOW:
                if used == words.size:
                    return EXHAUSTED
                state = state << 32 | np.int64(words[used])
                used += 1
            quotient += symbol
            if quotient > most:
                return INDEX
        quotients[j] = quotient
    return LEFT_OVER if used < words.size or state != STATE_LOW else OK


@kernel
def _decode_unary(section: Any, most: Any, quotients: Any) -> Any:
    """Zeros before each one bit. Example: bytes 9, 2 are 1 001 000001: 0, 2, 5."""
    j, quotient = 0, np.int64(0)
    for at in range(section.size):
        byte = section[at]
        for bit in range(8):
            if byte >> bit & 1:
                if j == quotients.size:
                    return LEFT_OVER
                if quotient > most:
                    return INDEX
                quotients[j] = quotient
                quotient = np.int64(0)
                j += 1
            else:
                quotient += 1
    if j < quotients.size:
        return EXHAUSTED
    return LEFT_OVER if quotient >= 8 else OK


@kernel
def _decode_positions(low: Any, low_bits: Any, ends: Any, positions: Any, counts: Any) -> Any:
    """Quotients become positions in place; the inverse of `_encode_gaps`; counts is zero on entry."""
    total, at, t = ends[ends.size - 1], 0, 0
    pending, held = np.int64(0), 0
    position = np.int64(-1)
    for j in range(positions.size):
        while held < low_bits:
            pending |= np.int64(low[at]) << held
            held += 8
            at += 1
        position += (positions[j] << low_bits) + (pending & ((np.int64(1) << low_bits) - 1)) + 1
        pending >>= low_bits
        held -= low_bits
        if position >= total:
            return INDEX
        while position >= ends[t]:
            t += 1
        counts[t] += 1
        positions[j] = position
    return FILL if pending != 0 else OK


@kernel
def _decode_values(codes: Any, parameters: Any, counts: Any, value_bits: Any, values: Any) -> Any:
    """Levels are worked out one by one: 4 bits, lo 1.0, hi 4.0, code 0b1111: -4.0."""
    bits = values.view(np.uint32)
    mask = (np.int64(1) << (value_bits - 1)) - 1
    pending, held, at, j = np.int64(0), 0, 0, 0
    for t in range(counts.size):
        zero = (parameters[t, 0] & ZERO_LEVEL) >> 15
        lo, hi = parameters[t, 0] - (zero << 15), parameters[t, 1]
        if lo > hi or hi > MAX_FINITE or (zero and value_bits == 1):
            return PARAMETER
        span, steps = (hi - lo) << 16, max(1, mask - zero)
        for _ in range(counts[t]):
            while held < value_bits:
                pending |= np.int64(codes[at]) << held
                held += 8
                at += 1
            code = pending & (mask << 1 | 1)
            pending >>= value_bits
            held -= value_bits
            magnitude = code & mask
            if value_bits < 32:
                step = magnitude - zero
                magnitude = np.int64(0) if step < 0 else (lo << 16) + span * step // steps
            elif magnitude >= INFINITE:
                return VALUE
            bits[j] = magnitude | (code & (mask + 1)) << (32 - value_bits)
            j += 1
    return FILL if pending != 0 else OK


@kernel
def set_mean(
    positions: Any,
    values: Any,
    edges: Any,
    ends: Any,
    addresses: Any,
    scales: Any,
    lo: Any,
    hi: Any,
) -> None:
    """grads[t] ← scales[t] · values, in the order of the messages, for positions in [lo, hi).

    Block by block, so that what is added to was just set to zero. Message p has
    positions[edges[p] : edges[p + 1]]; `addresses` are those of the contiguous float32 tensors that
    end at `ends`.
    """
    cursors = edges[:-1].copy()
    for p in range(cursors.size):
        cursors[p] += np.searchsorted(positions[edges[p] : edges[p + 1]], lo)
    t = np.searchsorted(ends, lo, side="right")
    first = lo
    while first < hi:
        start = np.int64(0) if t == 0 else ends[t - 1]
        last = min(first + BLOCK, min(hi, ends[t]))
        if last > first:
            grad = tensor_at(addresses[t], first - start, last - start)
            grad[:] = 0.0
            for p in range(cursors.size):
                j, stop = cursors[p], edges[p + 1]
                while j < stop and positions[j] < last:
                    grad[positions[j] - first] += scales[t] * values[j]
                    j += 1
                cursors[p] = j
            first = last
        if last == ends[t]:
            t += 1
