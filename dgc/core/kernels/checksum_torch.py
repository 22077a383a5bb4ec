"""zlib's checksum where the bytes are, by torch: for messages that a GPU makes or reads."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_RUN = 256
"""Bytes whose checksum is taken by one look-up each."""


def crc32(data: Tensor, sizes: Tensor) -> Tensor:
    """zlib's CRC-32 of the first sizes[p] ≥ 4 bytes of each row of uint8 `[P, n]`: int64 `[P]`.

    A checksum is a sum over bits, without carries, of a constant for each bit's distance from the
    end; leading zeros count nothing. So the bytes are moved to the end of a buffer, runs of them are
    summed by tables, and the runs with one another.

    Example:
        >>> import zlib
        >>> data = torch.arange(1000).byte().view(1, -1)
        >>> int(crc32(data, torch.tensor([900]))) == zlib.crc32(bytes(data[0, :900].tolist()))
        True
    """
    rows, width = data.shape
    runs = -(-width // _RUN)
    near, far = _checksum_tables(runs, data.device)
    slots = torch.arange(-runs * _RUN, 0, device=data.device) + sizes[:, None]
    bytes_ = data.gather(1, slots.clamp(0, width - 1)) ^ (slots < 4) * 0xFF
    bytes_ = (bytes_ * (slots >= 0)).view(-1, _RUN)
    at = torch.arange(_RUN, device=data.device)
    sums = _xor_(near[at, bytes_]).view(rows, runs, 1)
    bits = sums >> torch.arange(32, device=data.device) & 1
    return _xor_((bits * far).view(rows, -1)) ^ 0xFFFFFFFF


def _xor_(numbers: Tensor) -> Tensor:
    """Each row of `[R, C]` folded by exclusive or, `[R]`; overwrites `numbers`."""
    size = numbers.shape[1]
    while size > 1:
        half = size // 2
        numbers[:, :half].bitwise_xor_(numbers[:, size - half : size])
        size -= half
    return numbers[:, 0]


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
