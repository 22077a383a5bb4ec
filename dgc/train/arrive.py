"""Messages read where they arrive, on a GPU; see `dgc.core.kernels.decode_torch`."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgc.core.rice import rice_code
from dgc.core.tables import Table
from dgc.train.frame import CHECKSUM_BYTES, FIXED_BYTES, NOT_FINITE, RICE, SOME_UNUSED, frame_head

if TYPE_CHECKING:
    from dgc.core.kernels.decode_torch import Decoded, Frame


class Expected(NamedTuple):
    """What the messages of a bucket are like, if all ranks make them on a GPU.

    Attributes:
        value_bits: width of a value code.
        slots: the most values that one can hold.
        settled: whether more like these follow, as after the warm-up.
    """

    value_bits: int
    slots: int
    settled: bool = True


def frame_of(messages: Tensor, numels: tuple[int, ...], expected: Expected) -> "Frame | None":
    """What all of P ≥ 1 messages `[P, bytes]` should be like; None if none can be like that."""
    from dgc.core.kernels.decode_torch import Frame

    if messages.dtype is not torch.uint8 or messages.dim() != 2 or not messages.shape[0]:
        return None
    if not 0 < expected.slots <= sum(numels):
        return None
    head = _head(numels, expected.value_bits, messages.device)
    if messages.shape[1] <= head.shape[1] + CHECKSUM_BYTES:
        return None
    low_bits = rice_code(sum(numels), expected.slots).low_bits
    flags = NOT_FINITE, SOME_UNUSED, RICE
    return Frame(head, numels, expected.value_bits, low_bits, expected.slots, *flags)


def read(messages: Tensor, frame: "Frame") -> "Decoded":
    """See `decode_torch.decode`."""
    from dgc.core.kernels import decode_torch

    with torch.cuda.device_of(messages):  # Triton launches on the current device
        return decode_torch.decode(messages, frame)


def verdict(found: "Decoded") -> tuple[bool, tuple[bool, ...]] | None:
    """Whether all messages are finite, and of each tensor whether one rank used it.

    The host waits for it. None if a message is not as expected: the host has to look at it.
    """
    report = found.report.cpu().numpy()
    bad, finite, used = report[:, 0], report[:, 1], report[:, 3:]
    if bad.any():
        return None
    return bool(finite.all()), tuple((used.sum(axis=0) > 0).tolist())


def write_(addresses: Tensor, factors: Tensor, numels: tuple[int, ...], found: "Decoded") -> None:
    """See `decode_torch.set_values_`."""
    from dgc.core.kernels import decode_torch

    with torch.cuda.device_of(addresses):
        decode_torch.set_values_(addresses, factors, numels, found)


@Table
def _head(numels: tuple[int, ...], value_bits: int, device: torch.device) -> Tensor:
    """`decode_torch.Frame.head`: the bytes up to the bitmap, but the code, length and some flags."""
    expected = np.frombuffer(frame_head(numels, value_bits, 0, None), np.uint8).copy()
    masks = np.full_like(expected, 0xFF)
    masks[4] = 0xFF & ~(NOT_FINITE | SOME_UNUSED | RICE)
    masks[5:FIXED_BYTES] = 0
    return torch.from_numpy(np.stack([masks, expected & masks])).to(device)
