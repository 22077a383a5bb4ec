"""What collectives cost, by formula: α seconds of latency a message, β seconds a byte."""

import math
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.comm.base import Communicator

_SMALL, _MOST = 1 << 10, 1 << 24  # bytes
_LONG = 0.02  # seconds that the larger message should take
_REPEATS = 3


class Link(NamedTuple):
    """The way between two ranks while all use theirs: latency α and time a byte β, in seconds.

    Formulas for `ranks` P and messages of `size` bytes, as in Thakur et al., 2005.

    Example:
        >>> Link(latency=0.5, byte_seconds=0.25).all_gather(ranks=3, size=2)
        2.0
    """

    latency: float
    byte_seconds: float

    def all_gather(self, ranks: int, size: float) -> float:
        """Every rank's message to every rank: (P−1)·(α + size·β)."""
        return (ranks - 1) * (self.latency + size * self.byte_seconds)

    def all_reduce(self, ranks: int, size: float) -> float:
        """The sum of all ranks' tensors on every rank: 2·(P−1)·(α + size/P·β)."""
        return 2 * self.all_gather(ranks, size / ranks)

    def reduce_scatter(self, ranks: int, size: float) -> float:
        """The sum, 1/P of it on each rank: (P−1)·(α + size/P·β)."""
        return self.all_gather(ranks, size / ranks)

    def all_to_all(self, ranks: int, size: float) -> float:
        """To each rank 1/P of `size`: (P−1)·(α + size/P·β)."""
        return self.all_gather(ranks, size / ranks)

    def broadcast(self, ranks: int, size: float) -> float:
        """From one rank to all: ⌈log₂ P⌉·(α + size·β)."""
        return math.ceil(math.log2(ranks)) * (self.latency + size * self.byte_seconds)

    @classmethod
    def fit(
        cls, formula: Callable[["Link", int, float], float], ranks: int, times: dict[int, float]
    ) -> "Link":
        """The link whose `formula` gives the two `times`, seconds by bytes; at least zero.

        Example:
            >>> link = Link(1e-4, 8e-9)
            >>> times = {n: link.all_reduce(4, n) for n in (1000, 1_000_000)}
            >>> fitted = Link.fit(Link.all_reduce, 4, times)
            >>> round(fitted.latency, 9), round(fitted.byte_seconds, 15)
            (0.0001, 8e-09)
        """
        (small, first), (large, last) = sorted(times.items())
        messages = formula(cls(1.0, 0.0), ranks, 0)
        share = formula(cls(0.0, 1.0), ranks, 1)
        byte_seconds = max(0.0, (last - first) / (share * (large - small)))
        return cls(max(0.0, (first - share * small * byte_seconds) / messages), byte_seconds)


class Links(NamedTuple):
    """One way as two collectives find it: they differ in what they copy and add."""

    gather: Link
    reduce: Link

    @classmethod
    def measure(cls, comm: Communicator, device: torch.device) -> "Links":
        """Time small and large messages on `device`; every rank of `comm` calls it, two at least."""
        ranks = comm.world_size

        def gather(size: int) -> Callable[[], Tensor]:
            message = torch.zeros(size, dtype=torch.uint8, device=device)
            return lambda: comm.all_gather(message).wait()

        def reduce(size: int) -> Callable[[], Tensor]:
            tensor = torch.zeros(size // 4, dtype=torch.float32, device=device)
            return lambda: comm.all_reduce(tensor).wait()

        return cls(
            Link.fit(Link.all_gather, ranks, _times(gather, comm)),
            Link.fit(Link.all_reduce, ranks, _times(reduce, comm)),
        )


def _times(make: Callable[[int], Callable[[], Tensor]], comm: Communicator) -> dict[int, float]:
    """Seconds of a small message, and of one so large that it takes a while."""
    small, size = _seconds(make(_SMALL), comm), 1 << 18
    while (large := _seconds(make(size), comm)) < _LONG and size < _MOST:
        size *= 4
    return {_SMALL: small, size: large}


def _seconds(collective: Callable[[], Tensor], comm: Communicator) -> float:
    taken = []
    for _ in range(_REPEATS + 1):
        comm.barrier()
        start = time.perf_counter()
        # A GPU's collective has ended when its result can be read.
        collective().view(-1)[:1].cpu()
        taken.append(time.perf_counter() - start)
    mine = torch.tensor([median(taken[1:])], device=comm.device)
    return float(comm.all_gather(mine).wait().max())  # the same on all ranks
