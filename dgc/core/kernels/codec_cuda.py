"""The message's body written where the values are, on a GPU: its host waits for nothing.

Indices are Rice coded, so that the place of every bit follows from sums. How many values there are
is known on the device alone, and so is where each section begins. `codec_reference` defines the
sections and decodes them. Shapes: T tensors, K slots for values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.kernels import cuda_fit, cuda_message
from dgc.core.kernels import encode_kernels as triton_kernels
from dgc.core.kernels.cuda_radix import find_kth_
from dgc.core.kernels.cuda_tables import BLOCK, Blocks, blocks_of
from dgc.core.rice import RiceCode
from dgc.core.sparse import SparseBatch
from dgc.core.tables import Table

_PACKED = 256
"""Bytes of a program that packs bits: each takes eight divisions."""


class _Slots(NamedTuple):
    """The slots of a bucket, on the device; int64 `[T]` each but for the programs.

    Attributes:
        blocks: programs for them.
        begins: the first slot of each tensor.
        offsets: where the tensor begins.
        fewer: how many of its values are sent where not all fit.
    """

    blocks: Blocks
    begins: Tensor
    offsets: Tensor
    fewer: Tensor

    @property
    def grid(self) -> tuple[int]:
        return (self.blocks.owners.numel(),)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What `cuda_slots` looks up."""
        return *self.blocks[:3], self.begins


@Table
def _slots(
    counts: tuple[int, ...], numels: tuple[int, ...], fewer: int, device: torch.device
) -> _Slots:
    """Those of tensors with `counts` values, of which `fewer` can be sent in all."""
    each, sizes = torch.tensor([counts, numels], dtype=torch.int64)
    rows = each.cumsum(0) - each, sizes.cumsum(0) - sizes, each * fewer // sum(counts)
    return _Slots(blocks_of(counts, device), *torch.stack(rows).to(device))


def encode(
    batch: SparseBatch,
    finite: Tensor,
    code: RiceCode,
    value_bits: int,
    *,
    head: Tensor,
    not_finite: int,
    message_bytes: int,
) -> tuple[Tensor, Tensor]:
    """A message; see `codec_reference.encode`.

    Args:
        batch: K ≥ 1 slots; a slot with the value 0 holds nothing, the others' indices ascend. The
            values of what is not sent are overwritten with 0.
        finite: bool `[]`; False sends nothing, and neither does a value that is not finite.
        code: made for the elements and the slots of the batch. Where the indices exceed its room,
            the largest `code.fewer` values are sent: of each tensor its share.
        value_bits: width of a value code.
        head: uint8, the message up to the number of values, of a finite gradient without values.
        not_finite: the flag in its fifth byte; the sixth is for the code, the next four for the length.
        message_bytes: room, enough for the body.

    Returns:
        The message, uint8 `[message_bytes]`, padded with zeros; and what a receiver will decode for
        each slot, float32 `[K]`, 0 where nothing is sent.
    """
    device, num_slots = head.device, batch.values.numel()
    slots, flat = _slots(batch.counts, batch.numels, code.fewer, device), _programs(num_slots)
    refused = torch.zeros(1, dtype=torch.int64, device=device)
    held = _hold(batch, slots, finite, code, refused)
    counted, front = _move_front(batch, slots, held)
    count = counted[-1:]
    low, bits = torch.empty_like(front), torch.empty_like(front)
    triton_kernels.split_gaps[flat](front, count, code.low_bits, num_slots, low, bits, BLOCK=BLOCK)
    ends = bits.cumsum(0)
    symbols, parameters, decoded = cuda_fit.quantize(
        batch.values, held, counted, slots.blocks, slots.begins, value_bits
    )
    words = torch.zeros(-(-message_bytes // 4), dtype=torch.int32, device=device)
    message = words.view(torch.uint8)[:message_bytes]
    starts = torch.empty(5, dtype=torch.int64, device=device)
    triton_kernels.begin[_programs(max(head.numel(), parameters.numel()))](
        *(head, head.numel(), parameters, parameters.numel(), count, ends[-1:], code.low_bits),
        *(refused, message, starts),
        VALUE_BITS=value_bits,
        NOT_FINITE=not_finite,
        BLOCK=BLOCK,
    )
    for number, each, at in ((code.low_bits, low, starts[1:]), (value_bits, symbols, starts[2:])):
        if number:
            grid = _programs(-(-num_slots * number // 8), _PACKED)
            triton_kernels.pack[grid](each, count, number, at, message, BLOCK=_PACKED)
    triton_kernels.place_ones[flat](ends, count, starts[3:], words, BLOCK=BLOCK)
    cuda_message.sign_(message, starts[4:])
    return message, decoded


def _programs(size: int, block: int = BLOCK) -> tuple[int]:
    return (-(-size // block),)


def _hold(
    batch: SparseBatch, slots: _Slots, finite: Tensor, code: RiceCode, refused: Tensor
) -> Tensor:
    """Which slots are sent, int32 `[K]`; refused ← 1 if nothing may be."""
    values, device = batch.values, batch.values.device
    held = torch.empty_like(values, dtype=torch.int32)
    triton_kernels.hold[slots.grid](values, *slots.tables, finite, held, refused, BLOCK=BLOCK)
    counted, front = _move_front(batch, slots, held)
    count, quotients = counted[-1:], torch.zeros(1, dtype=torch.int64, device=device)
    triton_kernels.add_quotients[_programs(values.numel())](
        front, count, code.low_bits, quotients, BLOCK=BLOCK
    )
    tensors = len(batch.counts)
    scarce, exact, rank = torch.empty(3, tensors, dtype=torch.int64, device=device).unbind()
    triton_kernels.judge_room[(tensors,)](
        *(count, code.low_bits, code.room, quotients, refused, slots.fewer, scarce, exact, rank)
    )
    ties = find_kth_(values, slots.blocks, slots.begins, scarce, exact, rank)
    triton_kernels.hold_what_fits[slots.grid](
        *(values, *slots.tables, slots.blocks.leads, refused, scarce, exact, rank, *ties, held),
        BLOCK=BLOCK,
    )
    return held


def _move_front(batch: SparseBatch, slots: _Slots, held: Tensor) -> tuple[Tensor, Tensor]:
    """How many are held up to each slot; and one more than the place of each; int64 `[K]`."""
    counted, front = held.cumsum(0), torch.empty_like(batch.indices)
    triton_kernels.move_front[slots.grid](
        batch.indices, *slots.tables, slots.offsets, held, counted, front, BLOCK=BLOCK
    )
    return counted, front
