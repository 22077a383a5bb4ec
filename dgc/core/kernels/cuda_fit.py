"""Values → levels and codes, all tensors of a bucket at once, on a GPU: the host waits for nothing.

The parameters are found by other arithmetic than on the CPU, so that no sum depends on an order; a
decoder takes any. Which code a value gets is as `codec_reference` defines it.
Shapes: T tensors, K slots for values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.kernels import fit_kernels as triton_kernels
from dgc.core.kernels.codec_reference import MAX_SEARCHED_LEVELS, SEARCH_BINS
from dgc.core.kernels.cuda_tables import BLOCK, Blocks
from dgc.core.quantize import parameter_bytes


class Quantized(NamedTuple):
    """The values of a bucket as they are sent.

    Attributes:
        symbols: sign and level of each value that is held, in order, int64 `[K]`; then any.
        parameters: those of the quantisers, uint8, `parameter_bytes` of each tensor.
        values: what a receiver decodes, float32 `[K]`; 0 in a slot that is not held.
    """

    symbols: Tensor
    parameters: Tensor
    values: Tensor


def quantize(
    values: Tensor,
    held: Tensor,
    counted: Tensor,
    blocks: Blocks,
    begins: Tensor,
    value_bits: int,
) -> Quantized:
    """Fit a quantiser to each tensor, and code its values.

    Args:
        values: float32 `[K]`, K ≥ 1, finite.
        held: int32 `[K]`, whether a slot holds a value that is sent: 1, or 0.
        counted: int64 `[K]`, the sums of `held`.
        blocks: programs for the slots of each tensor.
        begins: int64 `[T]`, the first slot of each.
        value_bits: width of a code.
    """
    device = values.device
    num_tensors, grid = begins.numel(), (blocks.owners.numel(),)
    slots = values, held, *blocks[:3], begins
    width = parameter_bytes(value_bits)
    parameters = torch.empty(num_tensors * width, dtype=torch.uint8, device=device)
    halves = parameters.view(torch.int16)
    if width:
        levels = 1 << (value_bits - 1)
        search = 1 < levels <= MAX_SEARCHED_LEVELS
        bin_bits = SEARCH_BINS.bit_length() - 1 if search else 0
        found = torch.zeros(num_tensors * (2 + (2 << bin_bits)), dtype=torch.int64, device=device)
        bounds, histogram = found[: 2 * num_tensors], found[2 * num_tensors :]
        triton_kernels.find_bounds[grid](*slots, bounds, num_tensors, BLOCK=BLOCK)
        if search or levels == 1:
            triton_kernels.fill_histogram[grid](
                *(*slots, bounds, histogram, num_tensors), BIN_BITS=bin_bits, BLOCK=BLOCK
            )
        if search:
            histogram = histogram.view(-1, SEARCH_BINS).cumsum(1)
        triton_kernels.find_levels[(num_tensors,)](
            *(bounds, histogram, halves, num_tensors),
            LEVELS=levels,
            BIN_BITS=bin_bits,
            SEARCH=search,
            enable_fp_fusion=False,
        )
    symbols, decoded = torch.empty_like(values, dtype=torch.int64), torch.empty_like(values)
    triton_kernels.give_codes[grid](
        *(*slots, halves, counted, symbols, decoded), VALUE_BITS=value_bits, BLOCK=BLOCK
    )
    return Quantized(symbols, parameters, decoded)
