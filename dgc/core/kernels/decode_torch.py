"""Messages read where they are, by Triton and torch: for a GPU, whose host waits for nothing.

For Rice coded messages of one size, width and code, as GPUs make them for one another; of any other
it is only said that it is not one. `codec_reference` defines what a message's values are.
Shapes: P messages, T tensors, K slots for the values of each message.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.kernels import cuda_tables
from dgc.core.kernels import decode_kernels as triton_kernels
from dgc.core.kernels.cuda_message import crc32
from dgc.core.kernels.cuda_tables import blocks_of, uploaded
from dgc.core.quantize import parameter_bytes
from dgc.core.tables import Table

BLOCK = 512
"""Bytes or slots of a program."""


class Frame(NamedTuple):
    """What messages of a bucket have in common.

    Attributes:
        head: uint8 `[2, H]` on the device: masks, and the first bytes as they must be under them, up
            to the bitmap of used tensors.
        numels: elements of each tensor, together at least one.
        value_bits: width of a value code.
        low_bits: of the Rice code.
        slots: K ≥ 1, the most values of a message.
        not_finite, some_unused, rice: bits of byte 4, the flags.
    """

    head: Tensor
    numels: tuple[int, ...]
    value_bits: int
    low_bits: int
    slots: int
    not_finite: int
    some_unused: int
    rice: int


class Decoded(NamedTuple):
    """Messages as they were read, on the device; those that are not `ok` mean nothing.

    Attributes:
        report: int64 `[P, 3 + T]`, all that the host needs to know: whether the message is bad,
            whether it is finite, its number of values, and of each tensor whether it was used.
        positions: int64 `[P, K]`, in the tensors laid end to end; 0 in slots without a value.
        values: float32 `[P, K]`; 0 in slots without a value.
    """

    report: Tensor
    positions: Tensor
    values: Tensor

    @property
    def ok(self) -> Tensor:
        """bool `[P]`: a valid message, of the kind that was expected."""
        return self.report[:, 0] == 0

    @property
    def finite(self) -> Tensor:
        """bool `[P]`."""
        return self.report[:, 1] != 0

    @property
    def counts(self) -> Tensor:
        """int64 `[P]`, how many values each message has."""
        return self.report[:, 2]

    @property
    def used(self) -> Tensor:
        """bool `[P, T]`, whether a tensor had a gradient on the sender."""
        return self.report[:, 3:] != 0


def decode(messages: Tensor, frame: Frame) -> Decoded:
    """Check and read P messages, without a read by the host.

    All that a decoder must check is checked: what is `ok` has the values that `codec_reference`
    decodes, bit for bit. What is not may be a valid message of another kind.

    Args:
        messages: uint8 `[P, bytes]`, contiguous, P ≥ 1, of more bytes than the frame's head.
        frame: what is expected.
    """
    (rows, width), device, slots = messages.shape, messages.device, frame.slots
    num_tensors, low_bits = len(frame.numels), frame.low_bits
    values_as = {
        "VALUE_BITS": frame.value_bits,
        "PARAMETER_BYTES": parameter_bytes(frame.value_bits),
        "BLOCK": BLOCK,
    }
    report = torch.empty(rows, 3 + num_tensors, dtype=torch.int64, device=device)
    sections = torch.empty(rows, 6, dtype=torch.int64, device=device)
    triton_kernels.read_frames[(rows,)](
        *(messages, width, frame.head, frame.head.shape[1]),
        *(num_tensors, slots, low_bits, report, sections),
        NOT_FINITE=frame.not_finite,
        SOME_UNUSED=frame.some_unused,
        RICE=frame.rice,
        **values_as,
    )
    checksums = crc32(messages, sections[:, 3])
    sums = torch.empty(rows, width + slots, dtype=torch.int64, device=device)
    triton_kernels.measure[(_programs(width + slots), rows)](
        messages, width, slots, low_bits, sections, sums, BLOCK=BLOCK
    )
    sums = sums.view(-1).cumsum(0)
    ones = torch.zeros(rows, slots, dtype=torch.int64, device=device)
    triton_kernels.place_ones[(_programs(width), rows)](
        messages, width, slots, sections, sums, ones, BLOCK=BLOCK
    )
    positions, values = torch.empty_like(ones), torch.empty(rows, slots, device=device)
    triton_kernels.finish[(_programs(slots), rows)](
        *(messages, width, slots, low_bits, sections, sums, ones, checksums),
        *(_ends(frame.numels, device), num_tensors, sum(frame.numels), report, positions, values),
        LEVELS=num_tensors.bit_length(),
        **values_as,
    )
    return Decoded(report, positions, values)


def add_values_(
    grads: Sequence[Tensor],
    positions: Sequence[Tensor],
    values: Sequence[Tensor],
    counts: Tensor,
    scales: Sequence[float],
) -> None:
    """As `reference.scatter_add_`; `counts` stay on the device. Overwrites `grads`."""
    numels, device = tuple(grad.numel() for grad in grads), grads[0].device
    addresses = uploaded([grad.data_ptr() for grad in grads], device)
    factors = torch.tensor(scales, dtype=torch.float32).to(device, non_blocking=True)
    _add_(addresses, factors, numels, positions, values, counts)


def set_values_(
    addresses: Tensor, factors: Tensor, numels: tuple[int, ...], found: Decoded
) -> None:
    """Of T gradients at `addresses` overwrite all with factors[t] × the sum of the messages' values.

    Args:
        addresses: int64 `[T]`, of contiguous float32 of `numels` elements.
        factors: float32 `[T]`.
        found: messages that are all ok.
    """
    blocks = blocks_of(numels, addresses.device)
    size = cuda_tables.BLOCK
    triton_kernels.clear[(blocks.owners.numel(),)](addresses, *blocks[:3], BLOCK=size)
    _add_(addresses, factors, numels, found.positions.unbind(), found.values.unbind(), found.counts)


def _add_(
    addresses: Tensor,
    factors: Tensor,
    numels: tuple[int, ...],
    positions: Sequence[Tensor],
    values: Sequence[Tensor],
    counts: Tensor,
) -> None:
    ends = _ends(numels, addresses.device)
    for where, what, count in zip(positions, values, counts, strict=True):
        if where.numel():
            # No place comes twice in a message, so the result does not depend on the order.
            triton_kernels.add_values[(_programs(where.numel()),)](
                *(addresses, ends, len(numels), factors, where, what, count),
                LEVELS=len(numels).bit_length(),
                BLOCK=BLOCK,
                enable_fp_fusion=False,
            )


def _programs(size: int) -> int:
    return -(-size // BLOCK)


@Table
def _ends(numels: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(numels)), dtype=torch.int64).to(device)
