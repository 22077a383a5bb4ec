"""A message made where the values are, by torch: for a GPU, whose host waits for nothing.

The layout is that of docs/wire.md, `frame.write_frame` writes it on the host. How many values there
are, and so where each section begins, is known on the device alone.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dgc.core.kernels import codec_torch
from dgc.core.kernels.codec_torch import Coded, Section
from dgc.core.rice import rice_code
from dgc.core.sparse import SparseBatch
from dgc.errors import ConfigError
from dgc.train.frame import CHECKSUM_BYTES, FIXED_BYTES, NOT_FINITE, frame_head, max_frame_bytes

_VARINT_BYTES = 5
"""Of the number of values, which is below 2^32."""


def encode_rice(
    batch: SparseBatch,
    value_bits: int,
    *,
    message_bytes: int,
    finite: bool | Tensor = True,
    used: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """`wire.encode_batch` of one value or more, by torch where the values are, for a GPU.

    The host waits for nothing. Indices are not checked, and a slot of value 0 is not sent. Where the
    indices exceed the room that `dgc.core.rice` gives them, as clusters may, the values that are
    least in their tensor are not sent: 4 % at density 0.001. On the CPU it runs in Triton's
    interpreter (`TRITON_INTERPRET=1`).
    """
    finite = batch.values.isfinite().all() & finite
    numels, code = batch.numels, rice_code(sum(batch.numels), batch.values.numel())
    least = max_frame_bytes(numels, batch.counts, value_bits, rice=True)
    if least > message_bytes:
        raise ConfigError(f"messages take up to {least} bytes, message_bytes is {message_bytes}")
    coded = codec_torch.encode(batch, finite, code, value_bits)
    message = assemble(
        *(coded, finite, numels, code.low_bits, value_bits), message_bytes=message_bytes, used=used
    )
    return message, coded.values


def assemble(
    coded: Coded,
    finite: Tensor,
    numels: tuple[int, ...],
    low_bits: int,
    value_bits: int,
    *,
    message_bytes: int,
    used: Sequence[bool] | None = None,
) -> Tensor:
    """The message, uint8 `[message_bytes]`, padded with zeros.

    Args:
        coded: the body; nothing of it is sent if not `finite`.
        finite: bool `[]`.
        numels: elements of each tensor.
        low_bits: of the Rice code.
        value_bits: width of a value code.
        message_bytes: room, enough for the body.
        used: for each tensor, whether it had a gradient.
    """
    from dgc.core.kernels import cuda_message

    used = None if used is None else tuple(used)
    head = _head(numels, value_bits, used, finite.device).clone()
    head[4] |= torch.where(finite, 0, NOT_FINITE).byte()
    head[5] = torch.where(coded.num_values > 0, low_bits, 0).byte()
    sections = (Section(head, _size(head)), _varint(coded.num_values), *coded.sections)
    message, end = cuda_message.join(sections, message_bytes)
    message[6:FIXED_BYTES] = _little_endian(end + CHECKSUM_BYTES)
    checksum = _little_endian(cuda_message.crc32(message[None], end.view(1)))
    cuda_message.put_(message, Section(checksum, _size(checksum)), end)
    return message


@lru_cache(maxsize=1024)
def _head(
    numels: tuple[int, ...], value_bits: int, used: tuple[bool, ...] | None, device: torch.device
) -> Tensor:
    data = bytearray(frame_head(numels, value_bits, 0, used, rice=True))
    return torch.frombuffer(data, dtype=torch.uint8).to(device)


def _size(data: Tensor) -> Tensor:
    return torch.full((), data.numel(), dtype=torch.int64, device=data.device)


def _little_endian(number: Tensor) -> Tensor:
    """The four lower bytes of one int64."""
    return number.view(1).view(torch.uint8)[:4]


def _varint(number: Tensor) -> Section:
    """LEB128 of int64 `[]` below 2^32.

    Example:
        >>> data, size = _varint(torch.tensor(300))
        >>> data[:size].tolist()
        [172, 2]
    """
    shifts = torch.arange(0, 7 * _VARINT_BYTES, 7, device=number.device)
    rest = number >> shifts
    size = 1 + (rest[1:] > 0).sum()
    digits = rest & 0x7F | torch.where(rest > 0x7F, 0x80, 0)
    return Section(digits.byte(), size)
