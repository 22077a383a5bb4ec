"""The values that flow from selection to the wire and back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sparse(NamedTuple):
    """A few elements of a flat tensor of `numel` elements.

    Attributes:
        indices: int64 `[k]`, strictly ascending, each in `[0, numel)`.
        values: floating point `[k]`, `values[j]` belongs at `indices[j]`.
        numel: number of elements of the dense tensor.

    Example:
        >>> Sparse(torch.tensor([1, 3]), torch.tensor([2.0, -1.0]), 5).to_dense().tolist()
        [0.0, 2.0, 0.0, -1.0, 0.0]
    """

    indices: Tensor
    values: Tensor
    numel: int

    def to_dense(self) -> Tensor:
        """The dense tensor `[numel]`, zero where nothing was selected, with the dtype of `values`."""
        dense = self.values.new_zeros(self.numel)
        dense[self.indices] = self.values
        return dense


class SparseBatch(NamedTuple):
    """The `Sparse` of each of T tensors, end to end, so that one kernel call handles a bucket.

    On a GPU some of the K may be unfilled slots, of index 0 and value 0: how many elements there are
    is known on the device alone. `filled` leaves them out.

    Attributes:
        indices: int64 `[K]`, K = sum(counts); within each tensor's run ascending and local to it.
        values: float32 `[K]`.
        counts: how many of the K belong to each tensor, length T; zero is allowed.
        numels: number of elements of each dense tensor, length T.

    Example:
        >>> one = Sparse(torch.tensor([1]), torch.tensor([2.0]), 4)
        >>> batch = SparseBatch.cat([one, one])
        >>> batch.indices.tolist(), batch.counts, batch.split()[1].numel
        ([1, 1], (1, 1), 4)
    """

    indices: Tensor
    values: Tensor
    counts: tuple[int, ...]
    numels: tuple[int, ...]

    @classmethod
    def cat(cls, tensors: Sequence[Sparse]) -> "SparseBatch":
        """Join a non-empty sequence of `Sparse`."""
        return cls(
            torch.cat([t.indices for t in tensors]),
            torch.cat([t.values for t in tensors]),
            tuple(t.indices.numel() for t in tensors),
            tuple(t.numel for t in tensors),
        )

    def filled(self) -> "SparseBatch":
        """Without the elements of value 0; the host waits for a GPU.

        Example:
            >>> zeros = SparseBatch(torch.tensor([3, 0]), torch.tensor([1.0, 0.0]), (2,), (9,))
            >>> zeros.filled().indices.tolist(), zeros.filled().counts
            ([3], (1,))
        """
        held = (self.values != 0).cpu()
        if bool(held.all()):
            return self
        owners = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        counts = torch.bincount(owners[held], minlength=len(self.counts)).tolist()
        kept = held.nonzero().flatten().to(self.values.device)
        return self._replace(
            indices=self.indices[kept], values=self.values[kept], counts=tuple(counts)
        )

    def split(self) -> list[Sparse]:
        """The tensors one by one, as views."""
        runs = zip(
            self.indices.split(self.counts),
            self.values.split(self.counts),
            self.numels,
            strict=True,
        )
        return [Sparse(indices, values, numel) for indices, values, numel in runs]
