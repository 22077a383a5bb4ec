"""Values → levels and codes, all tensors of a bucket at once, in torch: the host waits for nothing.

The parameters are found by other arithmetic than on the CPU, so that no sum depends on an order; a
decoder takes any. Which code a value gets is as `codec_reference` defines it.
Shapes: T tensors, K slots for values, L levels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.kernels.codec_reference import MAX_SEARCHED_LEVELS, SEARCH_BINS
from dgc.core.quantize import MAX_FINITE

MAGNITUDE = 0x7FFFFFFF
_GRID = 16
"""Candidates for each end of the levels, in each round of the search."""
_ROUNDS = 2
_TENSORS = 64
"""As many are searched at a time: a candidate takes some 200 bytes."""


class Magnitudes(NamedTuple):
    """|values| of a bucket, and to which tensor each belongs.

    Attributes:
        bits: int64 `[K]`, the float32 bit patterns; 0 in a slot that holds no value.
        owners: int64 `[K]`.
        num_tensors: T.
        most: the most values of one tensor.
    """

    bits: Tensor
    owners: Tensor
    num_tensors: int
    most: int

    @property
    def held(self) -> Tensor:
        return self.bits > 0

    def totals(self, numbers: Tensor) -> Tensor:
        """Sums of int64 `[K]` over each tensor, `[T]`."""
        return numbers.new_zeros(self.num_tensors).index_add_(0, self.owners, numbers)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest bits of each tensor, `[T]`; 0 where there are none."""
        none = self.bits.new_full((self.num_tensors,), MAGNITUDE)
        low = none.scatter_reduce(0, self.owners, self.bits.where(self.held, MAGNITUDE), "amin")
        high = torch.zeros_like(none).scatter_reduce(0, self.owners, self.bits, "amax")
        return low.minimum(high), high

    def scaled(self, high: Tensor) -> tuple[Tensor, Tensor]:
        """Values as integers, int64 `[K]`, and what a unit is worth in each tensor, float64 `[T]`.

        As large as the sums of their squares may be, so that these are exact in any order.
        """
        largest = (62 - max(1, self.most).bit_length()) // 2
        unit = floats(high.clamp(min=1)) * 2.0**-largest
        return (floats(self.bits) / unit[self.owners]).round().long(), unit


def floats(bits: Tensor) -> Tensor:
    """Bit patterns, int64, as float64. Example: 0x3F800000 is 1.0."""
    return bits.int().view(torch.float32).double()


def parameters(values: Magnitudes, value_bits: int) -> tuple[Tensor, Tensor]:
    """lo and hi of each tensor, int64 `[T]`, for 1 to 16 bits: upper halves of float32."""
    low, high = values.extremes()
    if value_bits == 1:
        counts = values.totals(values.held.long()).clamp(min=1)
        numbers, unit = values.scaled(high)
        mean = (values.totals(numbers).double() / counts * unit).float()
        level = upper(mean.view(torch.int32).long())
        return level, level
    outer = low >> 16, ((high + 0xFFFF) >> 16).clamp(max=MAX_FINITE)
    num_levels = 1 << (value_bits - 1)
    if num_levels > MAX_SEARCHED_LEVELS:
        return outer
    first, last = _search(values, low, high, num_levels)
    few = values.totals(values.held.long()) <= num_levels
    return outer[0].where(few, upper(first)), outer[1].where(few, upper(last))


def upper(bits: Tensor) -> Tensor:
    """The nearest upper half, at most `MAX_FINITE`."""
    return ((bits + 0x8000) >> 16).clamp(max=MAX_FINITE)


def _search(
    values: Magnitudes, low: Tensor, high: Tensor, num_levels: int
) -> tuple[Tensor, Tensor]:
    """First and last level of a small squared error: the best of a grid, and of a finer one."""
    span = high - low
    shift = (torch.frexp(span.double()).exponent.long() - SEARCH_BINS.bit_length() + 1).clamp(min=0)
    moments = _moments(values, low, high, shift)
    across = torch.arange(_GRID, device=low.device)
    first, last, step = low, high, span // _GRID
    for number in range(_ROUNDS):
        # The first round starts from the extremes, later ones lie around the best so far.
        inward = across - (_GRID // 2 if number else 0)
        firsts = (first[:, None] + step[:, None] * inward).maximum(low[:, None])
        lasts = (last[:, None] - step[:, None] * inward).minimum(high[:, None])
        firsts = firsts[:, :, None].expand(-1, -1, _GRID).flatten(1)
        lasts = lasts.repeat(1, _GRID).maximum(firsts)
        errors = _errors(moments, low, shift, firsts, lasts, num_levels)
        # The first of the best, which argmin does not promise.
        tied = torch.arange(_GRID**2, device=low.device).where(
            errors == errors.amin(1, keepdim=True), _GRID**2
        )
        best = tied.amin(1, keepdim=True)
        first, last = firsts.gather(1, best).squeeze(1), lasts.gather(1, best).squeeze(1)
        step = step * 2 // _GRID
    return first, last


def _moments(values: Magnitudes, low: Tensor, high: Tensor, shift: Tensor) -> Tensor:
    """Σ 1 and Σ v below each edge of the histogram's bins, float64 `[2, T, bins + 1]`."""
    owners = values.owners
    numbers, unit = values.scaled(high)
    bins = ((values.bits - low[owners]) >> shift[owners]).clamp(min=0, max=SEARCH_BINS - 1)
    at = owners * SEARCH_BINS + bins
    powers = torch.stack([values.held.long(), numbers])
    sums = powers.new_zeros(2, values.num_tensors * SEARCH_BINS).index_add_(1, at, powers)
    edges = sums.view(2, -1, SEARCH_BINS).cumsum(2).double()
    worth = torch.stack([torch.ones_like(unit), unit])[:, :, None]
    return torch.nn.functional.pad(edges * worth, (1, 0))


def _errors(
    moments: Tensor, low: Tensor, shift: Tensor, first: Tensor, last: Tensor, num_levels: int
) -> Tensor:
    """Σ (v − level)² − Σ v² for first and last levels `[T, C]`: float64 `[T, C]`.

    Each bin goes as a whole to the level that is nearest to its start.
    """
    runs = [each.split(_TENSORS) for each in (moments.transpose(0, 1), low, shift, first, last)]
    errors = [_errors_of(num_levels, *run) for run in zip(*runs, strict=True)]
    return errors[0] if len(errors) == 1 else torch.cat(errors)


def _errors_of(
    num_levels: int, moments: Tensor, low: Tensor, shift: Tensor, first: Tensor, last: Tensor
) -> Tensor:
    """`_errors` of a few tensors; moments `[T, 2, bins + 1]`.

    With N_j and S_j the count and the sum of the values below level j's bins, N and S those of all,
    and L the last level, Σ_j level_j²·count_j − 2·level_j·sum_j is, by parts,
    level_L²·N − 2·level_L·S + Σ_j≥1 (level_j − level_j−1)·(2·S_j − (level_j + level_j−1)·N_j).
    """
    steps = torch.arange(num_levels, device=low.device)
    table = floats(first[..., None] + (last - first)[..., None] * steps // (num_levels - 1))
    both = table[..., 1:] + table[..., :-1]
    middle = (both / 2).float().view(torch.int32)
    edges = (middle - low.int()[:, None, None]) >> shift.int()[:, None, None]
    edges = edges.clamp_(0, SEARCH_BINS).flatten(1).long()
    shares = 2 * moments[:, 1].gather(1, edges).view(both.shape)
    shares -= both.mul_(moments[:, 0].gather(1, edges).view(both.shape))
    count, total = moments[:, :, -1:].unbind(1)
    top: Tensor = table[..., -1]
    inner: Tensor = shares.mul_(table.diff(dim=2)).sum(2)
    return inner + top * (top * count - 2 * total)


def codes(values: Magnitudes, lo: Tensor, hi: Tensor, value_bits: int) -> tuple[Tensor, Tensor]:
    """The nearest level of each value and its bits, int64 `[K]` both; of two the lower."""
    low, span = (lo << 16)[values.owners], ((hi - lo) << 16)[values.owners]
    steps = max(1, (1 << (value_bits - 1)) - 1)
    if value_bits == 1:
        return torch.zeros_like(low), low
    below = ((values.bits - low).clamp(min=0) * steps // span.clamp(min=1)).clamp(max=steps)
    above = (below + 1).clamp(max=steps)
    under, over = low + span * below // steps, low + span * above // steps
    up = floats(values.bits) > (floats(under) + floats(over)) / 2
    return above.where(up, below), over.where(up, under)
