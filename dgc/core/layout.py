"""Where each tensor of a bucket lies in the flat state."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.tables import Table


class Layout(NamedTuple):
    """T tensors laid end to end in one flat tensor of n = sum(numels) elements.

    Attributes:
        numels: elements of each tensor, length T.
        offsets: first element of each tensor and, last, n; length T + 1.
        table: `offsets` as int64 `[T+1]` on the device of the flat tensor.

    Example:
        >>> Layout.of([3, 2]).offsets
        (0, 3, 5)
    """

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    table: Tensor

    @classmethod
    def of(cls, numels: Sequence[int], device: torch.device | str = "cpu") -> "Layout":
        """Lay tensors of `numels` elements end to end in a state on `device`."""
        offsets = tuple(accumulate(numels, initial=0))
        return cls(tuple(numels), offsets, torch.tensor(offsets, dtype=torch.int64, device=device))

    def places(self, indices: Tensor, counts: Sequence[int]) -> Tensor:
        """Where `indices` int64 `[K]` lie in the flat tensor, counts[t] of them in tensor t.

        The host waits for the device only when it has not seen these counts before.

        Example:
            >>> Layout.of([3, 2]).places(torch.tensor([2, 0, 1]), [1, 2]).tolist()
            [2, 3, 4]
        """
        each = _uploaded(tuple(counts), self.table.device)
        return indices + self.table[:-1].repeat_interleave(each, output_size=indices.numel())

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `flat` `[n]`, each a view `[numels[t]]`."""
        views: tuple[Tensor, ...] = torch.split(flat, list(self.numels))
        return views


@Table
def _uploaded(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(counts, dtype=torch.int64).to(device)
