"""Sorted indices → gaps → bits: a Golomb code whose quotients are entropy coded.

A gap g ≥ 0 counts the elements skipped since the previous index. It is split as
g = q·2^r + low: the r low bits are stored as they are, and q goes through a range coder (rANS)
with the static geometric model P(q) = y·(1−y)^q. A symbol ESCAPE stands for "Q more".

The cost of a gap is, up to rounding, a linear function of its length, so a set of `count` indices
costs no more than `max_index_bits(numel, count)` bits however they are spread, which is within
0.03 bits an index of the entropy limit numel·H(count/numel)/count.
"""

import math
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dgc.errors import ConfigError

PROBABILITY_BITS = 16
"""Frequencies of one table add up to 2^16."""
STATE_LOW = 1 << 31
"""The coder's state lies in [2^31, 2^63); it starts and must end at 2^31."""
STATE_BYTES = 8
NUM_CODES = 256
CODES_PER_OCTAVE = 8
MAX_TOTAL_NUMEL = 1 << 48
"""Largest number of elements that one message may address."""

_MAX_SYMBOLS = 128
_FULL_OCTAVES = 5
_COST_UNIT = 1 << 24
_STEP_LOSS_BITS = 2.0**-14


class GapCode(NamedTuple):
    """One of the 256 codes.

    Attributes:
        low_bits: r, how many low bits of a gap are stored as they are.
        starts: int64 `[Q + 2]`, cumulative frequencies; symbol Q is ESCAPE; the last entry is 2^16.
        index_cost: upper bound of the bits an index costs beside its quotient, in 2^-24 bit.
        quotient_cost: upper bound of the bits each unit of quotient costs, in 2^-24 bit.
    """

    low_bits: int
    starts: npt.NDArray[np.int64]
    index_cost: int
    quotient_cost: int


@cache
def gap_code(code: int) -> GapCode:
    """Code number `code` in [0, 256): made for gaps of mean about 2^(code/8), in integers only.

    Example:
        >>> gap_code(8).starts.tolist()  # half the gaps are 0, a quarter 1, ...
        [0, 32768, 49152, 57344, 61440, 63488, 64512, 65024, 65280, 65536]
        >>> gap_code(79).low_bits
        4
    """
    octave, eighth = divmod(code, CODES_PER_OCTAVE)
    starts = _starts(min(octave, _FULL_OCTAVES), eighth)
    low_bits = max(0, octave - _FULL_OCTAVES)
    return GapCode(low_bits, starts, *_costs(starts, low_bits))


# round(2^30 · 2^(-i/8)): written out, so that no platform's pow can change the format.
_EIGHTHS = (1073741824, 984625594, 902905651, 827968132, 759250125, 696235434, 638450708, 585461881)


def _starts(octave: int, eighth: int) -> npt.NDArray[np.int64]:
    total, one = 1 << PROBABILITY_BITS, 1 << 30
    num_symbols = min(_MAX_SYMBOLS, 4 << octave)
    stop, survival = _EIGHTHS[eighth] >> octave, one
    starts = []
    for symbol in range(num_symbols + 1):
        start = total - (survival >> (30 - PROBABILITY_BITS))
        # Every symbol, ESCAPE too, keeps a frequency of at least one.
        starts.append(min(max(start, symbol), total - (num_symbols + 1 - symbol)))
        survival -= (survival * stop) >> 30
    return np.array([*starts, total], dtype=np.int64)


def _costs(starts: npt.NDArray[np.int64], low_bits: int) -> tuple[int, int]:
    """The line a + b·q above all symbols' costs that is lowest at the mean quotient."""
    cost = PROBABILITY_BITS - np.log2(np.diff(starts)) + _STEP_LOSS_BITS
    quotients = np.arange(len(cost))
    escape, mean = len(cost) - 1, (1 << PROBABILITY_BITS) / starts[1] - 1
    slopes = (cost[1:] - cost[0]) / quotients[1:]
    slopes = np.concatenate([slopes[slopes > cost[escape] / escape], cost[-1:] / escape])
    offsets = (cost[:-1] - slopes[:, None] * quotients[:-1]).max(axis=1)
    best = int(np.argmin(offsets + slopes * mean))
    return (
        math.ceil((float(offsets[best]) + low_bits) * _COST_UNIT) + 1,
        math.ceil(float(slopes[best]) * _COST_UNIT) + 1,
    )


def _cost(code: int, numel: int, count: int) -> int:
    gap = gap_code(code)
    return count * gap.index_cost + ((numel - count) >> gap.low_bits) * gap.quotient_cost


def max_code_bits(code: int, numel: int, count: int) -> int:
    """Bits that `count` indices below `numel` take at most with this code, the state apart.

    Example:
        >>> max_code_bits(8, 1000, 500), max_code_bits(79, 1000, 500)
        (1001, 4939)
    """
    return -(-_cost(code, numel, count) // _COST_UNIT)


@lru_cache(maxsize=4096)
def choose_code(numel: int, count: int) -> int:
    """The code with the smallest bound for `count` of `numel` indices, the lowest among equals.

    Example:
        >>> choose_code(1000, 500), choose_code(25_557_032, 25_558)
        (8, 79)
    """
    if not 0 <= count <= numel <= MAX_TOTAL_NUMEL:
        raise ConfigError(
            f"{count} indices in {numel} elements: a message holds at most {MAX_TOTAL_NUMEL} "
            "elements, each at most once"
        )
    return min(range(NUM_CODES), key=lambda code: (_cost(code, numel, count), code))


def max_index_bits(numel: int, count: int) -> int:
    """Bits that `count` or fewer indices below `numel` take at most, the coder's state apart.

    The bound of `choose_code` is concave in `count` and rises up to numel/2; from there on it is
    numel bits, what one bit an element would take.

    Example:
        >>> max_index_bits(1_000_000, 1000) / 1000  # the limit is 11.41
        11.429
    """
    code = choose_code(numel, count)
    if 2 * count <= numel:
        return max_code_bits(code, numel, count)
    half = gap_code(CODES_PER_OCTAVE)
    return -(-numel * max(half.index_cost, half.quotient_cost) // _COST_UNIT)


def max_index_bytes(numel: int, count: int) -> int:
    """Bytes that `count` or fewer indices below `numel` take at most; 0 for none."""
    return 0 if count == 0 else 1 + STATE_BYTES + -(-max_index_bits(numel, count) // 8)
