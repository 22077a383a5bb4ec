"""Values ↔ codes: sign and magnitude, with the levels spaced evenly in the float's bit pattern.

The bit pattern of a positive float32, read as an integer, is a piecewise linear logarithm, so
evenly spaced patterns are nearly geometric levels. They need no transcendental function, are
monotonic, finite, and reach from the smallest denormal to the largest finite number.

Levels of a tensor whose parameters are (lo, hi), each the upper 16 bits of a float32 (bfloat16),
for n = 2^(value_bits − 1) magnitudes, / rounding down:

    level_j = bits⁻¹( lo·2^16 + (hi − lo)·2^16·j / (n − 1) )           j = 0 … n − 1

With the top bit of lo set, level_0 is zero and the other n − 1 are spread from lo to hi.
One bit: the only level is lo. 32 bits: the float32 itself, without levels.
"""

import numpy as np
import numpy.typing as npt

from dgc.errors import ConfigError

VALUE_BITS = (1, 2, 3, 4, 8, 16, 32)
"""The widths a value code may have, sign included."""
MAX_FINITE = 0x7F7F
"""Upper 16 bits of the largest parameter: 3.39e38."""
ZERO_LEVEL = 0x8000
"""Set in lo: the first level is zero."""


def check_value_bits(value_bits: int) -> int:
    """`value_bits` itself, or `ConfigError` when codes of that width do not exist."""
    if value_bits not in VALUE_BITS:
        raise ConfigError(f"value_bits is {value_bits!r}: give one of {VALUE_BITS}")
    return value_bits


def parameter_bytes(value_bits: int) -> int:
    """Bytes of parameters for each tensor.

    Example:
        >>> [parameter_bytes(bits) for bits in VALUE_BITS]
        [2, 4, 4, 4, 4, 4, 0]
    """
    return {1: 2, 32: 0}.get(value_bits, 4)


def levels(lo: int, hi: int, value_bits: int) -> npt.NDArray[np.float32]:
    """The magnitudes that codes of `value_bits` < 32 stand for, ascending.

    Args:
        lo, hi: the parameters, lo & 0x7FFF <= hi <= MAX_FINITE.

    Returns:
        float32 `[2^(value_bits − 1)]`.

    Example:
        >>> one, four = 0x3F80, 0x4080
        >>> levels(one, four, 3).tolist(), levels(ZERO_LEVEL | one, four, 2).tolist()
        ([1.0, 1.6666666269302368, 2.6666665077209473, 4.0], [0.0, 1.0])
    """
    num_levels = 1 << (value_bits - 1)
    zero = int(lo & ZERO_LEVEL != 0)
    low, high = (lo & ~ZERO_LEVEL) << 16, hi << 16
    steps = np.arange(num_levels - zero, dtype=np.int64)
    bits = low + (high - low) * steps // max(1, len(steps) - 1) if value_bits > 1 else steps + low
    bits = np.concatenate([np.zeros(zero, np.int64), bits])
    return bits.astype(np.int32).view(np.float32)
