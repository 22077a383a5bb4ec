"""zlib's checksum where the bytes are, on a GPU."""

from functools import partial

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
    near, far = _checksum_tables(runs, data.device)
    found = torch.full((rows,), 0xFFFFFFFF, dtype=torch.int64, device=data.device)
    decode_kernels.checksum[(runs, rows)](
        data, width, runs, sizes, sizes.stride(0), near, far, found, RUN=_RUN
    )
    return found


@partial(Table, last=64)  # half a megabyte each, and more
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
