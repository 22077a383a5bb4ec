"""How float32 values are rounded to what a bfloat16 state stores; the definition, in plain torch.

Rounding to nearest would lose what is smaller than 2^-9 of the value it is added to, every time: an
accumulated gradient would stop growing. So values are rounded up or down at random, to the value in
the mean. The random numbers are a hash of the place and a seed: no generator, and the same bits on
every device and for any number of threads.
"""

from typing import TypeVar

import torch
from torch import Tensor

U_BITS, V_BITS = 0, 16
"""Of the 32 random bits of a place u takes those from bit 0 on, v those from bit 16 on."""

_Ints = TypeVar("_Ints", int, Tensor)


def mixed(x: _Ints) -> _Ints:
    """A permutation of [0, 2^32) without visible order; it leaves 0 where it is.

    Source: C. Wellons, hash-prospector, "lowbias32".

    Example:
        >>> mixed(1), mixed(torch.tensor([1, 2])).tolist()
        (1753845952, [1753845952, 3507691905])
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)


def seed_of(*numbers: int) -> int:
    """A seed in [0, 2^32) from numbers in [0, 2^32).

    Example:
        >>> seed_of(1, 2) == seed_of(1, 2), seed_of(1, 2) == seed_of(2, 1)
        (True, False)
    """
    seed = 0
    for number in numbers:
        seed = mixed(seed ^ number)
    return seed


def rounded(values: Tensor, places: Tensor, dtype: torch.dtype, seed: int, bits: int) -> Tensor:
    """`values` as a state of `dtype` stores them: as they are, or rounded at random to bfloat16.

    bfloat16 is the upper half of a float32. The lower half r carries into the upper one where
    r + d >= 2^16, with d the 16 bits of mixed(place ^ seed) from `bits` on: with probability
    r / 2^16. So the error is less than a unit in the last place, at most 2^-7 of the value, and its
    mean is zero. Beyond 3.38e38 the carry gives inf.

    Args:
        values: float32 `[k]`, finite.
        places: int64 `[k]`, where in the state they are stored.
        dtype: torch.float32 or torch.bfloat16.
        seed: in [0, 2^32), another one each time that a state is written.
        bits: `U_BITS` or `V_BITS`.

    Example, 1 + 3·2^-9 = 0x3F80C000, three quarters of the way from 1 to 1 + 2^-7:
        >>> value = torch.full((1000,), 1 + 3 * 2**-9)
        >>> stored = rounded(value, torch.arange(1000), torch.bfloat16, 5, V_BITS)
        >>> stored.unique().tolist(), round(stored.float().mean().item(), 3)
        ([1.0, 1.0078125], 1.006)
    """
    if dtype == torch.float32:
        return values
    draws = mixed((places & 0xFFFFFFFF) ^ seed) >> bits & 0xFFFF
    return ((values.view(torch.int32) + draws) >> 16).short().view(torch.bfloat16)
