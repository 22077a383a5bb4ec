"""A message put together on a GPU, and zlib's checksum where the bytes are."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dgc.core.kernels import decode_kernels as triton_kernels
from dgc.core.kernels.codec_torch import Section

BLOCK = 1024
"""Bytes of a program."""
_RUN = 256
"""Bytes whose checksum is taken by one look-up each."""


def join(sections: Sequence[Section], room: int) -> tuple[Tensor, Tensor]:
    """The sections' parts end to end, then zeros: uint8 `[room]`; and where they end, int64 `[]`.

    The host does not wait. Example: parts of 2 and 3 bytes end at 5.
    """
    sizes = torch.stack([section.size for section in sections])
    ends = sizes.cumsum(0)
    message = torch.zeros(room, dtype=torch.uint8, device=sizes.device)
    for section, start in zip(sections, (ends - sizes).unbind(), strict=True):
        put_(message, section, start)
    return message, ends[-1]


def put_(message: Tensor, section: Section, at: Tensor) -> None:
    """Overwrite `message` with the section's part from `at`, int64 `[]`, on."""
    room = section.data.numel()
    if room:
        triton_kernels.put[(-(-room // BLOCK),)](
            message, section.data, section.size, at, BLOCK=BLOCK
        )


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
    triton_kernels.checksum[(runs, rows)](
        data, width, runs, sizes, sizes.stride(0), near, far, found, RUN=_RUN
    )
    return found


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
