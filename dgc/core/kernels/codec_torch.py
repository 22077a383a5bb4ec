"""The message's body written where the values are, by torch: for a GPU, whose host waits for nothing.

Indices are Rice coded, so that the place of every bit follows from sums. How many values there are
is known on the device alone: sections have room for the most there can be, and what they really
hold is a tensor. `codec_reference` defines the sections and decodes them.
Shapes: T tensors, K slots for values.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.kernels import codec_torch_fit as fit
from dgc.core.kernels.cuda_trim import owners_of
from dgc.core.quantize import parameter_bytes
from dgc.core.rice import RiceCode, most_bits
from dgc.core.sparse import SparseBatch


class Section(NamedTuple):
    """Bytes of which only the first are part of the message.

    Attributes:
        data: uint8 `[room]`.
        size: int64 `[]`, bytes of the part.
    """

    data: Tensor
    size: Tensor


class Coded(NamedTuple):
    """A body on its way into a message.

    Attributes:
        num_values: int64 `[]`, how many values it carries.
        sections: those of `codec_reference.Body`, in order.
        values: float32 `[K]`, what a receiver will decode for each slot; 0 where nothing is sent.
    """

    num_values: Tensor
    sections: tuple[Section, ...]
    values: Tensor


class _Slots(NamedTuple):
    """The slots of a bucket, on the device: int64 `[K]` each.

    Attributes:
        owners: which tensor a slot belongs to.
        starts: where that tensor begins.
        firsts: the first of its slots.
        fewer: how many of its values are sent where not all fit.
    """

    owners: Tensor
    starts: Tensor
    firsts: Tensor
    fewer: Tensor

    @classmethod
    def of(cls, batch: SparseBatch, fewer: int) -> "_Slots":
        """Those of a batch of which `fewer` values can be sent in all."""
        total = sum(batch.counts)
        table = _table(batch.counts, batch.numels, fewer, batch.values.device)
        owners = owners_of(table[0], total)
        starts, firsts, share = table[1:, owners]
        return cls(owners, starts, firsts, share)


@lru_cache(maxsize=1024)
def _table(
    counts: tuple[int, ...], numels: tuple[int, ...], fewer: int, device: torch.device
) -> Tensor:
    """By tensor: how many slots; where it begins, its first slot, its share of `fewer`; `[4, T]`."""
    each, sizes = torch.tensor([counts, numels], dtype=torch.int64)
    rows = (each, sizes.cumsum(0) - sizes, each.cumsum(0) - each, each * fewer // sum(counts))
    return torch.stack(rows).to(device)


def encode(batch: SparseBatch, finite: Tensor, code: RiceCode, value_bits: int) -> Coded:
    """The body of a message, K ≥ 1; see `codec_reference.encode`.

    Args:
        batch: K slots; a slot with the value 0 holds nothing, the others' indices ascend.
        finite: bool `[]`; False sends nothing.
        code: made for the elements and the slots of the batch. Where the indices exceed its room,
            the largest `code.fewer` values are sent: of each tensor its share.
    """
    slots = _Slots.of(batch, code.fewer)
    magnitude = batch.values.view(torch.int32).long() & fit.MAGNITUDE
    places = batch.indices + slots.starts
    held = (magnitude > 0) & finite
    gaps = _gaps(places, held)
    held &= _fits(gaps, held, code) | (_ranks(magnitude, slots) < slots.fewer)
    gaps, count = _gaps(places, held), held.sum()
    low = gaps & ((1 << code.low_bits) - 1)
    symbols, parameters, values = _quantize(batch, magnitude.where(held, 0), slots, value_bits)
    quotients = gaps >> code.low_bits
    ends = (quotients + 1).cumsum(0)
    last = torch.where(count > 0, ends.gather(0, (count - 1).clamp(min=0).view(1)).view(()), 0)
    size = places.numel()
    room = most_bits(sum(batch.numels), size, code.low_bits) - size * code.low_bits
    width = torch.full_like(count, parameters.numel())
    sections = (
        Section(parameters, torch.where(count > 0, width, 0)),
        Section(pack_bits(low, code.low_bits), _bytes(count * code.low_bits)),
        Section(pack_bits(_front(symbols, held), value_bits), _bytes(count * value_bits)),
        Section(_unary(ends - 1, count, room), _bytes(last)),
    )
    return Coded(count, sections, values)


def _bytes(bits: Tensor) -> Tensor:
    return (bits + 7) // 8


def _front(numbers: Tensor, held: Tensor) -> Tensor:
    """The numbers of the slots that hold a value, in order, then zeros; `[K]`.

    Example:
        >>> _front(torch.tensor([5, 6, 7]), torch.tensor([True, False, True])).tolist()
        [5, 7, 0]
    """
    size = numbers.numel()
    at = torch.where(held, held.cumsum(0) - 1, size)  # all others meet behind the end
    return numbers.new_zeros(size + 1).scatter(0, at, numbers)[:size]


def _gaps(places: Tensor, held: Tensor) -> Tensor:
    """Elements skipped before each place that is held, in order, then zeros; int64 `[K]`.

    Example:
        >>> _gaps(torch.tensor([1, 9, 4]), torch.tensor([True, False, True])).tolist()
        [1, 2, 0]
    """
    front = _front(places + 1, held)
    before = torch.nn.functional.pad(front[:-1], (1, 0))
    return (front - before - 1).clamp(min=0)


def _fits(gaps: Tensor, held: Tensor, code: RiceCode) -> Tensor:
    return held.sum() * (code.low_bits + 1) + (gaps >> code.low_bits).sum() <= code.room


def _ranks(magnitude: Tensor, slots: _Slots) -> Tensor:
    """How many values of its tensor come before each by magnitude, of equal ones the first."""
    order = ((slots.owners << 31) | (fit.MAGNITUDE - magnitude)).argsort(stable=True)
    at = torch.arange(order.numel(), device=order.device)
    return torch.empty_like(order).scatter(0, order, at) - slots.firsts


def _quantize(
    batch: SparseBatch, magnitude: Tensor, slots: _Slots, value_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int64 `[K]` by slot; parameters, uint8; values float32 `[K]` as decoded."""
    negative = batch.values < 0
    values = fit.Magnitudes(magnitude, slots.owners, len(batch.counts), max(batch.counts))
    if value_bits == 32:
        levels, bits, rows = magnitude, magnitude, magnitude[:0]
    else:
        lo, hi = fit.parameters(values, value_bits)
        levels, bits = fit.codes(values, lo, hi, value_bits)
        rows = torch.stack([lo, hi], 1)[:, : parameter_bytes(value_bits) // 2].reshape(-1)
    halves = torch.stack([rows & 0xFF, rows >> 8], 1).reshape(-1).byte()
    decoded = bits.int().view(torch.float32)
    decoded = torch.where(negative, -decoded, decoded).where(values.held, 0.0)
    return levels | negative.long() << (value_bits - 1), halves, decoded


def _unary(ones: Tensor, count: Tensor, room: int) -> Tensor:
    """A bit string with a one at each of the first `count` places of `ones`, as bytes.

    Example:
        >>> _unary(torch.tensor([0, 3, 9, 10]), torch.tensor(3), 12).tolist()
        [9, 2]
    """
    size = -(-room // 8) * 8
    slots = torch.arange(ones.numel(), device=ones.device)
    bits = torch.zeros(size + 1, dtype=torch.uint8, device=ones.device)
    return _packed(bits.scatter(0, torch.where(slots < count, ones, size), 1)[:size])


def pack_bits(symbols: Tensor, width: int) -> Tensor:
    """As `codec_reference.pack_bits`, of int64 `[K]`: uint8 `[ceil(K·width / 8)]`.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3]), 3).tolist()
        [209, 0]
    """
    if width % 8 == 0:
        planes = [(symbols >> shift & 0xFF).byte() for shift in range(0, width, 8)]
        return torch.stack(planes, 1).reshape(-1) if planes else symbols[:0].byte()
    bits = symbols[:, None] >> torch.arange(width, device=symbols.device) & 1
    return _packed(torch.nn.functional.pad(bits.byte().reshape(-1), (0, -bits.numel() % 8)))


def _packed(bits: Tensor) -> Tensor:
    """Eight bits a byte, the lowest first; uint8 `[8·B]` to `[B]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)
