"""Values → levels and codes, compiled; `codec_reference.quantize` defines the result."""

from typing import Any

import numpy as np

from dgc.core.kernels.codec_reference import MAX_SEARCHED_LEVELS, SEARCH_BINS, Status
from dgc.core.kernels.compiled import kernel
from dgc.core.quantize import MAX_FINITE

OK, VALUE = Status.OK.value, Status.VALUE.value
INFINITE = 0x7F800000
MAGNITUDE = 0x7FFFFFFF


@kernel
def encode_values(
    values: Any, counts: Any, value_bits: Any, parameters: Any, codes: Any, decoded: Any
) -> Any:
    """Codes are packed, `parameters` `[T, 2]` and the values as decoded are returned."""
    bits, out = values.view(np.int32), decoded.view(np.uint32)
    for i in range(bits.size):
        if bits[i] & MAGNITUDE >= INFINITE:
            return VALUE
    mask = (np.int64(1) << (value_bits - 1)) - 1
    moments, levels = np.empty((3, SEARCH_BINS)), np.empty(MAX_SEARCHED_LEVELS, np.float32)
    table, middles = np.empty(MAX_SEARCHED_LEVELS, np.int64), np.empty(MAX_SEARCHED_LEVELS)
    pending, held, at, j = np.int64(0), 0, 0, 0
    for t in range(counts.size):
        stop = j + counts[t]
        lo, hi, zero = np.int64(0), np.int64(0), np.int64(0)
        if value_bits < 32 and stop > j:
            lo, hi, zero = _fit(values[j:stop], mask + 1, moments, levels)
            parameters[t, 0], parameters[t, 1] = lo | zero << 15, hi
        low, span, steps = lo << 16, (hi - lo) << 16, max(1, mask - zero)
        if mask < MAX_SEARCHED_LEVELS:
            _tabulate(low, span, steps, zero, mask, table, middles)
        while j < stop:
            pattern = np.int64(bits[j]) & MAGNITUDE
            code = pattern
            if mask < MAX_SEARCHED_LEVELS:
                code = np.int64(0)
                for i in range(mask):
                    code += np.float64(_float(pattern)) > middles[i]
                pattern = table[code]
            elif value_bits < 32:
                code = _nearest(pattern, low, span, steps, zero, mask)
                pattern = _level(code, low, span, steps, zero)
            sign = np.int64(bits[j] < 0)
            out[j] = pattern | sign << 31
            pending |= (code | sign << (value_bits - 1)) << held
            held += value_bits
            while held >= 8:
                codes[at] = pending & 0xFF
                pending >>= 8
                held -= 8
                at += 1
            j += 1
    if held > 0:
        codes[at] = pending
    return OK


@kernel
def _float(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


@kernel
def _level(code: Any, low: Any, span: Any, steps: Any, zero: Any) -> Any:
    return np.int64(0) if code < zero else low + span * (code - zero) // steps


@kernel
def _tabulate(
    low: Any, span: Any, steps: Any, zero: Any, mask: Any, table: Any, middles: Any
) -> None:
    """All levels as bits, and what lies half-way to the next."""
    for code in range(mask + 1):
        table[code] = _level(np.int64(code), low, span, steps, zero)
    for code in range(mask):
        below, above = _float(table[code]), _float(table[code + 1])
        middles[code] = (np.float64(below) + np.float64(above)) / 2


@kernel
def _nearest(pattern: Any, low: Any, span: Any, steps: Any, zero: Any, mask: Any) -> Any:
    """How many middles lie below the magnitude, without a table of them."""
    value = np.float64(_float(pattern))
    if span == 0:
        first = np.float64(_float(low))
        if value > first:
            return mask
        return zero if zero and value > first / 2 else np.int64(0)
    code = zero
    if pattern > low:
        code += min(((pattern - low) * steps) // span, steps)
        # Levels are rounded down, so the next one may be at or below the pattern.
        if code < mask and _level(code + 1, low, span, steps, zero) <= pattern:
            code += 1
    elif zero:
        code = np.int64(0)
    if code < mask:
        below = np.float64(_float(_level(code, low, span, steps, zero)))
        above = np.float64(_float(_level(code + 1, low, span, steps, zero)))
        if value > (below + above) / 2:
            code += 1
    return code


@kernel
def _upper(bits: Any) -> Any:
    return min((bits + 0x8000) >> 16, MAX_FINITE)


@kernel
def _fit(values: Any, num_magnitudes: Any, moments: Any, levels: Any) -> Any:
    """lo, hi, zero flag of one tensor that has values."""
    bits = values.view(np.int32)
    lowest, highest, positives = np.int64(MAGNITUDE), np.int64(0), 0
    total = 0.0
    for i in range(bits.size):
        pattern = np.int64(bits[i] & MAGNITUDE)
        total += np.float64(abs(values[i]))
        highest = max(highest, pattern)
        if pattern > 0:
            lowest = min(lowest, pattern)
            positives += 1
    if positives == 0:
        return np.int64(0), np.int64(0), np.int64(0)
    zero = np.int64(num_magnitudes > 1 and positives < bits.size)
    num_levels = num_magnitudes - zero
    if num_levels == 1:
        mean = np.float32(total / (positives if zero else bits.size))
        level = np.int64(_upper(np.int64(mean.view(np.int32))))
        return level, level, zero
    if positives <= num_levels or num_levels > MAX_SEARCHED_LEVELS:
        return lowest >> 16, min((highest + 0xFFFF) >> 16, MAX_FINITE), zero
    shift = 0
    while (highest - lowest) >> shift >= SEARCH_BINS:
        shift += 1
    _histogram(values, lowest, shift, moments)
    first, last = _search(moments, lowest, highest, shift, levels[:num_levels])
    return _upper(first), _upper(last), zero


@kernel
def _histogram(values: Any, low: Any, shift: Any, moments: Any) -> None:
    """Cumulative count, sum and sum of squares of the positive magnitudes, in bins of 2^shift bit patterns."""
    bits = values.view(np.int32)
    moments[:] = 0.0
    for i in range(bits.size):
        pattern = np.int64(bits[i] & MAGNITUDE)
        if pattern > 0:
            index, value = (pattern - low) >> shift, np.float64(abs(values[i]))
            moments[0, index] += 1.0
            moments[1, index] += value
            moments[2, index] += value * value
    for i in range(1, SEARCH_BINS):
        for moment in range(3):
            moments[moment, i] += moments[moment, i - 1]


@kernel
def _search(moments: Any, low: Any, high: Any, shift: Any, levels: Any) -> Any:
    """First and last level: each end is moved by a step while that helps, then it is halved."""
    first, last, step = low, high, (high - low) // 4
    best = _error(moments, low, shift, first, last, levels)
    smallest = (high - low) // SEARCH_BINS
    while step > smallest:
        moved = False
        for move in range(4):
            up = (step, np.int64(0), -step, np.int64(0))[move]
            down = (np.int64(0), step, np.int64(0), -step)[move]
            if first + up < low or first + up > last - down or last - down > high:
                continue
            error = _error(moments, low, shift, first + up, last - down, levels)
            if error < best:
                best, first, last, moved = error, first + up, last - down, True
        if not moved:
            step //= 2
    return first, last


@kernel
def _error(moments: Any, low: Any, shift: Any, first: Any, last: Any, levels: Any) -> Any:
    """Σ (v − level)², each bin going as a whole to the level that is nearest to its start."""
    bits, num_levels = levels.view(np.int32), levels.size
    for j in range(num_levels):
        bits[j] = first + (last - first) * j // (num_levels - 1)
    error, count, total, squares = 0.0, 0.0, 0.0, 0.0
    for j in range(num_levels):
        index = SEARCH_BINS - 1
        if j + 1 < num_levels:
            middle = np.float32((np.float64(levels[j]) + np.float64(levels[j + 1])) / 2)
            border = np.int64(middle.view(np.int32))
            index = min((border - low) >> shift, SEARCH_BINS) - 1
        if index >= 0:
            level, n, s, q = (
                np.float64(levels[j]),
                moments[0, index],
                moments[1, index],
                moments[2, index],
            )
            error += (q - squares) - 2 * level * (s - total) + level * level * (n - count)
            count, total, squares = n, s, q
    return error
