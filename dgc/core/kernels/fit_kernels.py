"""Triton kernels that fit a quantiser to the values of a bucket and give codes; `cuda_fit` launches them.

`cuda_slots` describes the programs. A slot that is not held has no value. Levels are given by bit
patterns, as in `dgc.core.quantize`. Shapes: T tensors, K slots.

    bounds      2 × T, int64     MAGNITUDE less the smallest magnitude's bits, and the largest's
    histogram   2 × T × bins     how many values are in a bin, and their sum in units of `_extremes`
"""

from typing import Any

import triton
import triton.language as tl

from dgc.core.kernels.cuda_kernels import MAGNITUDE
from dgc.core.kernels.cuda_slots import magnitude_of, slots_of
from dgc.core.quantize import MAX_FINITE as LARGEST

# Triton looks names up while it compiles, those of annotations too, and may not find "Any".
MAX_FINITE = tl.constexpr(LARGEST)
UNITS = tl.constexpr(2.0**-30)
"""Of the largest value: sums of 2^32 values are exact, in any order."""
GRID, ROUNDS = tl.constexpr(16), tl.constexpr(2)
"""Candidates for each end of the levels in each round of the search, and how many rounds."""


@triton.jit  # type: ignore[untyped-decorator]
def _held(
    values: "Any",
    held: "Any",
    owners: "Any",
    firsts: "Any",
    counts: "Any",
    begins: "Any",
    BLOCK: tl.constexpr,
) -> "Any":
    """The program's tensor and slots, which there are, and bits of magnitudes; 0 if not held."""
    t, _, slot, inside = slots_of(owners, firsts, counts, begins, BLOCK)
    sent = inside & (tl.load(held + slot, mask=inside, other=0) != 0)
    return t, slot, inside, magnitude_of(values, slot, sent)


@triton.jit  # type: ignore[untyped-decorator]
def _float(bits: "Any") -> "Any":
    """Bit patterns, int64, as float64. Example: 0x3F800000 is 1.0."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit  # type: ignore[untyped-decorator]
def _extremes(bounds: "Any", t: "Any", num_tensors: "Any") -> "Any":
    """Smallest and largest bits of tensor t, and what a unit of its sums is worth."""
    high = tl.load(bounds + num_tensors + t)
    low = tl.minimum(tl.load(bounds + t) ^ MAGNITUDE, high)
    return low, high, _float(tl.maximum(high, 1)) * UNITS


@triton.jit  # type: ignore[untyped-decorator]
def _shift(low: "Any", high: "Any", BIN_BITS: tl.constexpr) -> "Any":
    """How much narrower `high − low` must be to have BIN_BITS bits. Example: of 300 and 7 it is 2."""
    width = ((high - low).to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022
    return tl.maximum(width - BIN_BITS, 0)


@triton.jit(do_not_specialize=["num_tensors"])  # type: ignore[untyped-decorator]
def find_bounds(
    values: "Any",
    held: "Any",
    owners: "Any",
    firsts: "Any",
    counts: "Any",
    begins: "Any",
    bounds: "Any",
    num_tensors: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """Enter a block into `bounds`, which begins with zeros."""
    t, _, _, bits = _held(values, held, owners, firsts, counts, begins, BLOCK)
    tl.atomic_max(bounds + t, tl.max(tl.where(bits > 0, bits ^ MAGNITUDE, 0)))
    tl.atomic_max(bounds + num_tensors + t, tl.max(bits))


@triton.jit(do_not_specialize=["num_tensors"])  # type: ignore[untyped-decorator]
def fill_histogram(
    values: "Any",
    held: "Any",
    owners: "Any",
    firsts: "Any",
    counts: "Any",
    begins: "Any",
    bounds: "Any",
    histogram: "Any",
    num_tensors: "Any",
    BIN_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Enter a block into `histogram`, which begins with zeros."""
    t, _, _, bits = _held(values, held, owners, firsts, counts, begins, BLOCK)
    low, high, unit = _extremes(bounds, t, num_tensors)
    number = (_float(bits) / unit + 0.5).to(tl.int64)
    one = (bits > 0).to(tl.int64)
    BINS: tl.constexpr = 1 << BIN_BITS
    if BINS == 1:
        tl.atomic_add(histogram + t, tl.sum(one))
        tl.atomic_add(histogram + num_tensors + t, tl.sum(number))
    else:
        bin = tl.minimum(tl.maximum((bits - low) >> _shift(low, high, BIN_BITS), 0), BINS - 1)
        at = histogram + t * BINS + bin
        tl.atomic_add(at, one, mask=bits > 0)
        tl.atomic_add(at + num_tensors * BINS, number, mask=bits > 0)


@triton.jit(do_not_specialize=["num_tensors"])  # type: ignore[untyped-decorator]
def find_levels(
    bounds: "Any",
    histogram: "Any",
    parameters: "Any",
    num_tensors: "Any",
    LEVELS: tl.constexpr,
    BIN_BITS: tl.constexpr,
    SEARCH: tl.constexpr,
) -> None:
    """The parameters of a tensor, 1 or 2 halves of float32: first and last of LEVELS levels.

    One level is the mean. With SEARCH the best of a grid, and of a finer one around it; bins hold
    what is in them or before. Else, or of few values, the smallest and the largest.
    """
    t = tl.program_id(0)
    low, high, unit = _extremes(bounds, t, num_tensors)
    if LEVELS == 1:
        count = tl.maximum(tl.load(histogram + t), 1).to(tl.float64)
        mean = tl.load(histogram + num_tensors + t).to(tl.float64) / count * unit
        bits = mean.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
        tl.store(parameters + t, _upper(bits).to(tl.int16))
    else:
        lo, hi = low >> 16, tl.minimum((high + 0xFFFF) >> 16, MAX_FINITE)
        if SEARCH:
            first, last = _search(histogram, t, num_tensors, low, high, unit, LEVELS, BIN_BITS)
            if tl.load(histogram + ((t + 1) << BIN_BITS) - 1) > LEVELS:
                lo, hi = _upper(first), _upper(last)
        tl.store(parameters + 2 * t, lo.to(tl.int16))
        tl.store(parameters + 2 * t + 1, hi.to(tl.int16))


@triton.jit  # type: ignore[untyped-decorator]
def _upper(bits: "Any") -> "Any":
    """The nearest upper half, at most `MAX_FINITE`. Example: 0x3F808000 gives 0x3F81."""
    return tl.minimum((bits + 0x8000) >> 16, MAX_FINITE)


@triton.jit  # type: ignore[untyped-decorator]
def _search(
    histogram: "Any",
    t: "Any",
    num_tensors: "Any",
    low: "Any",
    high: "Any",
    unit: "Any",
    LEVELS: tl.constexpr,
    BIN_BITS: tl.constexpr,
) -> "Any":
    """First and last level of a small squared error, as bits, int64.

    Each bin goes as a whole to the level that is nearest to its start. With N_j and S_j the count and
    the sum of the values below level j's bins, N and S those of all, and L the last level,
    Σ (v − level)² − Σ v² is, by parts,
    level_L²·N − 2·level_L·S + Σ_j≥1 (level_j − level_j−1)·(2·S_j − (level_j + level_j−1)·N_j).
    """
    BINS: tl.constexpr = 1 << BIN_BITS
    below = histogram + t * BINS - 1
    shift, step = _shift(low, high, BIN_BITS), (high - low) // GRID
    total = tl.load(below + num_tensors * BINS + BINS).to(tl.float64) * unit
    count = tl.load(below + BINS).to(tl.float64)
    candidate = tl.arange(0, GRID * GRID)
    first, last = low, high
    for number in tl.static_range(ROUNDS):
        # The first round starts from the extremes, later ones lie around the best so far.
        middle = GRID // 2 if number else 0
        firsts = tl.maximum(first + step * (candidate // GRID - middle), low)
        lasts = tl.minimum(last - step * (candidate % GRID - middle), high)
        lasts = tl.maximum(lasts, firsts)
        level = _float(firsts)
        error = level * 0
        for j in tl.static_range(1, LEVELS):
            above = _float(firsts + (lasts - firsts) * j // (LEVELS - 1))
            both = above + level
            between = (both / 2).to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
            edge = tl.minimum(tl.maximum((between - low) >> shift, 0), BINS)
            numbers = tl.load(below + edge, mask=edge > 0, other=0).to(tl.float64)
            sums = tl.load(below + num_tensors * BINS + edge, mask=edge > 0, other=0)
            error += (2 * (sums.to(tl.float64) * unit) - both * numbers) * (above - level)
            level = above
        error += level * (level * count - 2 * total)
        best = candidate == tl.argmin(error, 0)
        first = tl.sum(tl.where(best, firsts, 0))
        last = tl.sum(tl.where(best, lasts, 0))
        step = step * 2 // GRID
    return first, last


@triton.jit  # type: ignore[untyped-decorator]
def give_codes(
    values: "Any",
    held: "Any",
    owners: "Any",
    firsts: "Any",
    counts: "Any",
    begins: "Any",
    parameters: "Any",
    counted: "Any",
    symbols: "Any",
    decoded: "Any",
    VALUE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The nearest level of each value, of two the lower: its code with the sign, and what it says.

    Codes go to the front: counted[slot] are held up to a slot. With 32 bits a value is its own code.
    """
    t, slot, inside, bits = _held(values, held, owners, firsts, counts, begins, BLOCK)
    code, level = bits, bits
    if VALUE_BITS == 1:
        code = bits * 0
        level = code + (tl.load(parameters + t).to(tl.int64) << 16)
    elif VALUE_BITS < 32:
        STEPS: tl.constexpr = (1 << (VALUE_BITS - 1)) - 1
        low = tl.load(parameters + 2 * t).to(tl.int64) << 16
        span = (tl.load(parameters + 2 * t + 1).to(tl.int64) << 16) - low
        below = tl.maximum(bits - low, 0) * STEPS // tl.maximum(span, 1)
        below = tl.minimum(below, STEPS)
        above = tl.minimum(below + 1, STEPS)
        under, over = low + span * below // STEPS, low + span * above // STEPS
        up = _float(bits) > (_float(under) + _float(over)) / 2
        code, level = tl.where(up, above, below), tl.where(up, over, under)
    negative = (tl.load(values + slot, mask=bits > 0, other=0.0) < 0).to(tl.int64)
    # By its bits: Triton's minus of 0 is 0, a receiver's is not.
    value = (level | negative << 31).to(tl.int32).to(tl.float32, bitcast=True)
    to = symbols + tl.load(counted + slot, mask=bits > 0, other=1) - 1
    tl.store(to, code | negative << (VALUE_BITS - 1), mask=bits > 0)
    tl.store(decoded + slot, tl.where(bits > 0, value, 0.0), mask=inside)
