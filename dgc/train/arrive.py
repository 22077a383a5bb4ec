"""Messages read where they arrive, on a GPU; see `dgc.core.kernels.decode_torch`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgc.core import kernels
from dgc.core.rice import rice_code
from dgc.train.frame import CHECKSUM_BYTES, FIXED_BYTES, NOT_FINITE, RICE, SOME_UNUSED, frame_head
from dgc.train.wire import check_dense

if TYPE_CHECKING:
    from dgc.core.kernels.decode_torch import Frame


class Expected(NamedTuple):
    """What the messages of a bucket are like, if all ranks make them on a GPU.

    Attributes:
        value_bits: width of a value code.
        slots: the most values that one can hold.
    """

    value_bits: int
    slots: int


def set_mean_there_(
    messages: Tensor, grads: Sequence[Tensor], scales: Sequence[float], expected: Expected
) -> tuple[bool, tuple[bool, ...]] | None:
    """As `wire.set_mean_`, where the messages are; the host reads once whether they are valid.

    Args:
        messages: uint8 `[P, bytes]`, on a device where messages are made.
        grads: T contiguous float32 tensors there, overwritten.
        scales: a factor for each tensor.
        expected: what all messages should be like.

    Returns:
        Whether all messages are finite, and of each tensor whether one rank used it. None, and
        nothing was written, if a message is not as expected: the host has to look at it.
    """
    from dgc.core.kernels import decode_torch

    check_dense(grads)
    numels = tuple(grad.numel() for grad in grads)
    if messages.dtype is not torch.uint8 or messages.dim() != 2 or not messages.shape[0]:
        return None
    if not 0 < expected.slots <= sum(numels) or grads[0].device != messages.device:
        return None
    frame = frame_of(numels, expected, messages.device)
    if messages.shape[1] <= frame.head.shape[1] + CHECKSUM_BYTES:
        return None
    found = decode_torch.decode(messages.contiguous(), frame)
    report = found.report.cpu().numpy()
    bad, finite, used = report[:, 0], report[:, 1], report[:, 3:]
    if bad.any():
        return None
    torch._foreach_zero_(list(grads))
    kernels.scatter_add_(
        grads, found.positions.unbind(), found.values.unbind(), found.counts, scales
    )
    return bool(finite.all()), tuple((used.sum(axis=0) > 0).tolist())


def frame_of(numels: tuple[int, ...], expected: Expected, device: torch.device) -> "Frame":
    """What is expected, as `decode_torch.decode` takes it; at least one slot."""
    from dgc.core.kernels.decode_torch import Frame

    return Frame(
        _head(numels, expected.value_bits, device),
        numels,
        expected.value_bits,
        rice_code(sum(numels), expected.slots).low_bits,
        expected.slots,
        NOT_FINITE,
        SOME_UNUSED,
        RICE,
    )


@lru_cache(maxsize=1024)
def _head(numels: tuple[int, ...], value_bits: int, device: torch.device) -> Tensor:
    """`decode_torch.Frame.head`: the bytes up to the bitmap, but the code, length and some flags."""
    expected = np.frombuffer(frame_head(numels, value_bits, 0, None), np.uint8).copy()
    masks = np.full_like(expected, 0xFF)
    masks[4] = 0xFF & ~(NOT_FINITE | SOME_UNUSED | RICE)
    masks[5:FIXED_BYTES] = 0
    return torch.from_numpy(np.stack([masks, expected & masks])).to(device)
