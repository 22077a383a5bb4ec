"""zlib's checksum where the bytes are, on a GPU."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dgc.core.kernels import decode_kernels, encode_kernels
from dgc.core.tables import Table

_RUN = 256
"""Bytes whose checksum is taken by one look-up each."""


def sign_(message: Tensor, end: Tensor) -> None:
    """Write the checksum of all before `end`, int64 `[1]`, from there on; uint8 `[bytes]`."""
    found = crc32(message[None], end)
    encode_kernels.finish[(1,)](message, found, end)


def crc32(data: Tensor, sizes: Tensor) -> Tensor:
    """zlib's CRC-32 of the first sizes[p] ≥ 4 bytes of each row of uint8 `[P, n]`: int64 `[P]`.

    A checksum is a sum over bits, without carries, of a constant for each bit's distance from the
    end; leading zeros count nothing. So bytes are summed in runs, counted from the end, by a table
    of what a byte counts, and the runs by one of what the bits of a run's sum do.
    """
    rows, width = data.shape
    runs = -(-width // _RUN)
    near, far = _near(data.device), _far((runs - 1).bit_length(), data.device)[-runs:]
    found = torch.full((rows,), 0xFFFFFFFF, dtype=torch.int64, device=data.device)
    decode_kernels.checksum[(runs, rows)](
        data, width, runs, sizes, sizes.stride(0), near, far, found, RUN=_RUN
    )
    return found


def _step() -> npt.NDArray[np.int64]:
    """What eight more bits of zeros make of a sum, by its low byte."""
    step = np.arange(256, dtype=np.int64)
    for _ in range(8):
        step = np.where(step & 1, step >> 1 ^ 0xEDB88320, step >> 1)
    return step


@Table
def _near(device: torch.device) -> Tensor:
    """What a byte counts by its place in a run, int64 `[256, 256]`."""
    step = _step()
    near = [step]
    for _ in range(_RUN - 1):
        near.append(step[near[-1] & 0xFF] ^ near[-1] >> 8)
    return torch.from_numpy(np.stack(near[::-1])).to(device)


@Table
def _far(doublings: int, device: torch.device) -> Tensor:
    """What a bit of a run's sum counts, int64 `[2^doublings, 32]`; the last run is the last row."""
    step, over = _step(), 1 << np.arange(32, dtype=np.int64)
    far = [over]
    for _ in range(_RUN):
        over = step[over & 0xFF] ^ over >> 8
    for _ in range((1 << doublings) - 1):
        bits = far[-1][:, None] >> np.arange(32) & 1
        far.append(np.bitwise_xor.reduce(np.where(bits, over, 0), axis=1))
    return torch.from_numpy(np.stack(far[::-1])).to(device)
