"""What the programs of a GPU look up: which elements each works on, and what a step tells them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.tables import Table

BLOCK = 2048
"""Elements of a program, all of one tensor."""


class Blocks(NamedTuple):
    """Which tensor each program works on, and from which of its elements; int64, on the device.

    Attributes:
        owners: the tensor of each program.
        firsts: the first of its elements, in its tensor.
        numels: of each tensor.
        leads: the first program of the same tensor.
    """

    owners: Tensor
    firsts: Tensor
    numels: Tensor
    leads: Tensor


@Table
def blocks_of(numels: tuple[int, ...], device: torch.device) -> Blocks:
    """The programs for tensors of `numels` elements.

    Example:
        >>> blocks_of((3, 5000), torch.device("cpu")).firsts.tolist()
        [0, 0, 2048, 4096]
    """
    sizes = torch.tensor(numels, dtype=torch.int64)
    per_tensor = (sizes + BLOCK - 1) // BLOCK
    owners = torch.arange(len(numels)).repeat_interleave(per_tensor)
    leads = (per_tensor.cumsum(0) - per_tensor)[owners]
    firsts = (torch.arange(owners.numel()) - leads) * BLOCK
    return Blocks(*(table.to(device) for table in (owners, firsts, sizes, leads)))


def uploaded(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`numbers` as int64 on `device`; the host does not wait for it."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
