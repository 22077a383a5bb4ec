"""Dense → Sparse: which elements are sent."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from dgc.core import kernels
from dgc.core.kernels.reference import largest
from dgc.core.layout import Layout
from dgc.core.sparse import Sparse, SparseBatch
from dgc.errors import ConfigError


def num_selected(numel: int, density: float, least: int = 1) -> int:
    """k = max(least, ceil(density · numel)), at most numel: how many elements are sent at `density`.

    Example:
        >>> num_selected(5000, 0.001), num_selected(10, 0.001), num_selected(10, 0.001, least=16)
        (5, 1, 10)
    """
    # A product such as 0.001 * 5000 may land one ulp above the integer that is meant.
    return min(numel, max(least, math.ceil(density * numel * (1 - 1e-12))))


def select_topk(tensor: Tensor, k: int) -> Sparse:
    """The `k` elements of largest magnitude, in ascending order of index.

    Among equal magnitudes those of lowest index are taken, on every device.

    Args:
        tensor: floating point without nan, any shape, read as flat; not kept.
        k: how many, in [1, numel].

    Raises:
        ConfigError: if `k` is out of range or the tensor holds nan.

    Example:
        >>> select_topk(torch.tensor([1.0, -5.0, 0.0, 3.0]), 2)
        Sparse(indices=tensor([1, 3]), values=tensor([-5.,  3.]), numel=4)
    """
    flat = tensor.detach().reshape(-1)
    if not 1 <= k <= flat.numel():
        raise ConfigError(f"k is {k} for a tensor of {flat.numel()} elements: give 1 <= k <= numel")
    indices = largest(flat, k)
    if indices.numel() != k:
        raise ConfigError(f"{int(flat.isnan().sum())} elements are nan: magnitudes have no order")
    return Sparse(indices, flat[indices], flat.numel())


def topk_mask(tensor: Tensor, k: int) -> Tensor:
    """`select_topk` as a mask, bool shaped as `tensor`, without an index for each element.

    Of an empty tensor 0 elements are selected.

    Example:
        >>> topk_mask(torch.tensor([1.0, -5.0, 1.0, 3.0]), 3).tolist()
        [True, True, False, True]
    """
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return torch.ones_like(tensor, dtype=torch.bool)
    if flat.device.type != "cpu":
        mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
        return mask.index_fill_(0, select_topk(flat, k).indices, True).view(tensor.shape)
    if bool(flat.isnan().any()):
        raise ConfigError("some elements are nan: magnitudes have no order")
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    ordered = flat.abs().to(wide).numpy()
    ordered.partition(flat.numel() - k)
    kth = float(ordered[flat.numel() - k])
    del ordered
    mask = flat.abs() > kth
    ties = (flat.abs() == kth).nonzero().squeeze(1)
    mask[ties[: k - int(mask.sum())]] = True
    return mask.view(tensor.shape)


class Selector(ABC):
    """Which elements of a bucket are sent: a frozen configuration; what it remembers is `state`.

    Attributes:
        recordable: whether on a GPU `accumulate_select_` neither makes the host wait nor uploads,
            and takes `kernels.addresses` and seeds that are there; then its work is recorded once
            and started again in each step.
    """

    recordable: ClassVar[bool] = False

    def state(self, layout: Layout) -> Tensor | None:
        """A fresh state for a bucket, on the device of `layout.table`; None if none is needed."""
        return None

    @abstractmethod
    def select_(
        self, v: Tensor, layout: Layout, counts: Sequence[int], state: Tensor | None
    ) -> SparseBatch:
        """At most counts[t] elements of each tensor t of `v` `[n]`; overwrites `state`."""

    def accumulate_select_(
        self,
        grads: Sequence[Tensor] | Tensor,
        u: Tensor | None,
        v: Tensor,
        layout: Layout,
        update: Tensor,
        counts: Sequence[int],
        state: Tensor | None,
        seed: int | Tensor = 0,
    ) -> tuple[bool | Tensor, SparseBatch]:
        """`kernels.accumulate_`, then `select_`; overwrites `u`, `v` and `state`.

        Returns:
            True and the selection; or False and an empty one if a gradient is not finite: then
            `u` and `v` are as they were. On a GPU bool `[]` there, and the host need not wait.
        """
        finite = kernels.accumulate_(grads, u, v, layout, update, seed)
        wanted = counts if finite else [0] * len(counts)
        return finite, self.select_(v, layout, wanted, state)


@dataclass(frozen=True)
class ExactTopK(Selector):
    """The counts[t] largest magnitudes of each tensor, of equal ones the first; never a zero.

    Example:
        >>> batch = ExactTopK().select_(torch.tensor([2.0, -3.0, 1.0]), Layout.of([3]), [2], None)
        >>> batch.indices.tolist()
        [0, 1]
    """

    recordable = True

    def select_(
        self, v: Tensor, layout: Layout, counts: Sequence[int], state: Tensor | None
    ) -> SparseBatch:
        return kernels.select_(v, layout, counts, state)

    def accumulate_select_(
        self,
        grads: Sequence[Tensor] | Tensor,
        u: Tensor | None,
        v: Tensor,
        layout: Layout,
        update: Tensor,
        counts: Sequence[int],
        state: Tensor | None,
        seed: int | Tensor = 0,
    ) -> tuple[bool | Tensor, SparseBatch]:
        return kernels.accumulate_select_(grads, u, v, layout, update, counts, state, seed)


@dataclass(frozen=True)
class ThresholdTopK(ExactTopK):
    """What `ExactTopK` selects, found sooner with a threshold from the step before.

    The state holds one threshold a tensor, guessed so that about twice as many elements reach it
    as are sent; the largest of them are the selection. A tensor where too few do is searched
    again. So the state saves time and never changes what is selected.

    Example:
        >>> layout = Layout.of([3])
        >>> selector = ThresholdTopK()
        >>> state = selector.state(layout)
        >>> selector.select_(torch.tensor([2.0, -3.0, 1.0]), layout, [2], state).indices.tolist()
        [0, 1]
    """

    def state(self, layout: Layout) -> Tensor | None:
        return torch.zeros(len(layout.numels), dtype=torch.float32, device=layout.table.device)


@dataclass(frozen=True)
class ChunkedTopK(Selector):
    """The largest magnitudes of each run of `chunk` elements, each run with its share of counts[t].

    Run j of a tensor of n elements, from a to b, may send ⌊k·b/n⌋ − ⌊k·a/n⌋ elements, so the
    shares add up to k = counts[t].

    Attributes:
        chunk: elements a run, at least 1; the last run of a tensor may be shorter.

    Raises:
        ConfigError: if `chunk` is less than 1.

    Example:
        >>> selector = ChunkedTopK(chunk=2)
        >>> v = torch.tensor([9.0, 8.0, 1.0, 2.0])
        >>> selector.select_(v, Layout.of([4]), [2], None).indices.tolist()
        [0, 3]
    """

    chunk: int = 4096

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ConfigError(f"chunk is {self.chunk} elements: give at least 1")

    def select_(
        self, v: Tensor, layout: Layout, counts: Sequence[int], state: Tensor | None
    ) -> SparseBatch:
        starts, sizes, shares = _runs(layout.numels, tuple(counts), self.chunk)
        pieces = kernels.select_(v, Layout.of(sizes, v.device), shares, None)
        return _join(pieces, starts, layout)


@lru_cache(maxsize=1024)
def _runs(
    numels: tuple[int, ...], counts: tuple[int, ...], chunk: int
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Where each run begins in its tensor, how long it is, and its share of the tensor's count."""
    starts, sizes, shares = [], [], []
    for numel, k in zip(numels, counts, strict=True):
        for start in range(0, numel, chunk):
            end = min(start + chunk, numel)
            starts.append(start)
            sizes.append(end - start)
            shares.append(k * end // numel - k * start // numel)
    return torch.tensor(starts, dtype=torch.int64), tuple(sizes), tuple(shares)


def _join(pieces: SparseBatch, starts: Tensor, layout: Layout) -> SparseBatch:
    """The tensors of `layout` out of consecutive pieces; `starts` says where in its tensor each is.

    Example: pieces of 2 + 2 elements with indices [0], [1] and starts [0, 2]: indices [0, 3].
    """
    counts = torch.tensor(pieces.counts, dtype=torch.int64)
    ends = torch.tensor(pieces.numels, dtype=torch.int64).cumsum(0)
    # The pieces of a tensor are those that end where it ends or before.
    last = torch.searchsorted(ends, layout.table.cpu()[1:], right=True)
    total = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[last]
    return SparseBatch(
        pieces.indices + starts.repeat_interleave(counts).to(pieces.indices.device),
        pieces.values,
        tuple(total.diff(prepend=total.new_zeros(1)).tolist()),
        layout.numels,
    )
