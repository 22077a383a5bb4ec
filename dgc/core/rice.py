"""Sorted indices → gaps → bits, each gap on its own: the Rice code that a GPU can write.

A gap g ≥ 0 counts the elements skipped since the previous index, g = q·2^r + low. The r low bits
are stored as they are; q is stored as q zeros and a one, in a section of its own. So where each
bit goes follows from sums, and no value waits for another, as it does in the range coder of
`dgc.core.pack`. The price is about 0.1 bit an index.

However the indices are spread, K of them in N elements take K·(r + 1) + ((N − K) >> r) bits at most.
That is 0.4 bit an index more than indices drawn at random need, for which the numbers low / 2^r
have a mean over 0.4. So less room is reserved; where it does not do, fewer values are sent.
"""

import math
from functools import lru_cache
from typing import NamedTuple

from dgc.core.pack import MAX_TOTAL_NUMEL, gap_code
from dgc.errors import ConfigError

MAX_LOW_BITS = 47
"""A gap is below 2^48."""
_MEAN_LOW = (13, 5)
"""13 / 2^5 = 0.406: what low / 2^r is in the mean, at least, where r is the best."""


def low_bits_of(code: int, rice: bool) -> int:
    """How many low bits of a gap are stored as they are: a Rice code's number is that itself."""
    return code if rice else gap_code(code).low_bits


class RiceCode(NamedTuple):
    """How indices are coded, and in how much room.

    Attributes:
        low_bits: r.
        room: bits reserved for all low bits and all quotients together.
        fewer: so many of the indices fit into `room` however they are spread.
    """

    low_bits: int
    room: int
    fewer: int


@lru_cache(maxsize=4096)
def rice_code(numel: int, count: int) -> RiceCode:
    """The code of the least room for `count` of `numel` indices, in integers only.

    Raises:
        ConfigError: there are more indices than elements, or too many elements.

    Example:
        >>> code = rice_code(25_557_032, 25_558)
        >>> code.low_bits, code.room / 25_558, code.fewer / 25_558  # doctest: +ELLIPSIS
        (9, 11.564..., 0.961...)
    """
    if not 0 <= count <= numel <= MAX_TOTAL_NUMEL:
        raise ConfigError(
            f"{count} indices in {numel} elements: a message holds at most {MAX_TOTAL_NUMEL} "
            "elements, each at most once"
        )
    low_bits = min(range(MAX_LOW_BITS + 1), key=lambda r: (_room(numel, count, r), r))
    room = _room(numel, count, low_bits)
    if room == most_bits(numel, count, low_bits):
        return RiceCode(low_bits, room, count)
    return RiceCode(low_bits, room, max(0, (room - (numel >> low_bits)) // (low_bits + 1)))


def most_bits(numel: int, count: int, low_bits: int) -> int:
    """Bits that `count` indices below `numel` take at most.

    Example:
        >>> most_bits(100, 2, 4)  # twice five, and 98 // 16
        16
    """
    return count * (low_bits + 1) + ((numel - count) >> low_bits)


def _room(numel: int, count: int, low_bits: int) -> int:
    """The mean for indices drawn at random, rounded up, and about ten standard deviations."""
    factor, shift = _MEAN_LOW
    most = most_bits(numel, count, low_bits)
    spare = (count * factor >> shift) - (count * factor >> (shift + low_bits))
    return min(most, most - spare + 3 * math.isqrt(count) + 8)


def rice_bytes(numel: int, count: int) -> int:
    """Bytes of the two sections of `count` or fewer indices, as they are sent; 0 for none."""
    return -(-rice_code(numel, count).room // 8) + 1 if count else 0
