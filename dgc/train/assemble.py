"""A message made where the values are, by torch: for a GPU, whose host waits for nothing.

The layout is that of docs/wire.md, `frame.write_frame` writes it on the host. How many values there
are, and so where each section begins, is known on the device alone.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
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
_RUN = 256
"""Bytes whose checksum is taken by one look-up each."""


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
    least in their tensor are not sent: 4 % at density 0.001.

    Example:
        >>> batch = SparseBatch(torch.tensor([7]), torch.tensor([-3.0]), (1,), (64,))
        >>> message, values = encode_rice(batch, 4, message_bytes=40)
        >>> message.numel(), values.tolist()
        (40, [-3.0])
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
    device = finite.device
    head = _head(numels, value_bits, None if used is None else tuple(used), device).clone()
    sections = (Section(head, _size(head)), _varint(coded.num_values), *coded.sections)
    length = torch.stack([section.size for section in sections]).sum() + CHECKSUM_BYTES
    head[4] |= torch.where(finite, 0, NOT_FINITE).byte()
    head[5] = torch.where(coded.num_values > 0, low_bits, 0).byte()
    head[6:FIXED_BYTES] = _little_endian(length)
    message = torch.zeros(message_bytes + 1, dtype=torch.uint8, device=device)
    at = torch.zeros_like(length)
    for section in sections:
        _put_(message, section, at)
        at = at + section.size
    checksum = _little_endian(crc32(message[:-1], at))
    _put_(message, Section(checksum, _size(checksum)), at)
    return message[:-1]


@lru_cache(maxsize=1024)
def _head(
    numels: tuple[int, ...], value_bits: int, used: tuple[bool, ...] | None, device: torch.device
) -> Tensor:
    data = bytearray(frame_head(numels, value_bits, 0, used, rice=True))
    return torch.frombuffer(data, dtype=torch.uint8).to(device)


def _size(data: Tensor) -> Tensor:
    return torch.full((), data.numel(), dtype=torch.int64, device=data.device)


def _little_endian(number: Tensor) -> Tensor:
    """The four bytes of int64 `[]`."""
    return torch.stack([number >> shift & 0xFF for shift in (0, 8, 16, 24)]).byte()


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


def _put_(message: Tensor, section: Section, at: Tensor) -> None:
    """The section's bytes from `at` on; what is not part of it goes behind the end."""
    slots = torch.arange(section.data.numel(), device=message.device)
    inside = slots < section.size
    message.scatter_(0, torch.where(inside, slots + at, message.numel() - 1), section.data)


def crc32(data: Tensor, size: Tensor) -> Tensor:
    """zlib's CRC-32 of the first `size` ≥ 4 bytes of uint8 `[n]`: int64 `[]`.

    A checksum is a sum over bits, without carries, of a constant for each bit's distance from the
    end; leading zeros count nothing. So the bytes are moved to the end of a buffer, runs of them are
    summed by tables, and the runs with one another.

    Example:
        >>> import zlib
        >>> data = torch.arange(1000).byte()
        >>> int(crc32(data, torch.tensor(900))) == zlib.crc32(bytes(data[:900].tolist()))
        True
    """
    runs = -(-data.numel() // _RUN)
    near, far = _checksum_tables(runs, data.device)
    slots = torch.arange(runs * _RUN, device=data.device) - (runs * _RUN - size)
    bytes_ = torch.where(slots >= 0, data[slots.clamp(0, data.numel() - 1)].long(), 0)
    bytes_ = torch.where((slots >= 0) & (slots < 4), bytes_ ^ 0xFF, bytes_)
    at = torch.arange(_RUN, device=data.device)
    sums = _xor(near[at, bytes_.view(runs, _RUN)])
    shifts = torch.arange(32, device=data.device)
    return _xor(torch.where((sums[:, None] >> shifts & 1).bool(), far, 0).view(1, -1))[0] ^ (
        0xFFFFFFFF
    )


def _xor(numbers: Tensor) -> Tensor:
    """Each row of `[R, C]` folded by exclusive or, `[R]`."""
    while numbers.shape[1] > 1:
        if numbers.shape[1] % 2:
            numbers = torch.nn.functional.pad(numbers, (0, 1))
        left, right = numbers.chunk(2, 1)
        numbers = left ^ right
    return numbers.squeeze(1)


@lru_cache(maxsize=64)
def _checksum_tables(runs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a byte counts by its place in a run, `[256, 256]`, and a bit of a run's sum, `[runs, 32]`."""
    step = np.arange(256, dtype=np.int64)
    for _ in range(8):
        step = np.where(step & 1, step >> 1 ^ 0xEDB88320, step >> 1)

    def advanced(sums: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The sums after one more byte of zeros."""
        moved: npt.NDArray[np.int64] = step[sums & 0xFF] ^ sums >> 8
        return moved

    near = [step]
    for _ in range(_RUN - 1):
        near.append(advanced(near[-1]))
    basis = 1 << np.arange(32, dtype=np.int64)
    over = basis
    for _ in range(_RUN):
        over = advanced(over)
    far = [basis]
    for _ in range(runs - 1):
        bits = far[-1][:, None] >> np.arange(32) & 1
        far.append(np.bitwise_xor.reduce(np.where(bits, over, 0), axis=1))
    tables = np.stack(near[::-1]), np.stack(far[::-1])
    return torch.from_numpy(tables[0]).to(device), torch.from_numpy(tables[1]).to(device)
