"""From `DGC.pattern` to the bucket that exchanges so."""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgc.comm.base import Communicator
from dgc.comm.exchange import Pattern
from dgc.comm.hosts import Hosts
from dgc.config import DGC
from dgc.core.layout import Layout
from dgc.errors import ConfigError
from dgc.train.bucket import Bucket, CompressedBucket, Row
from dgc.train.choice import Costs, choose, explain, predict
from dgc.train.hierarchical import HierarchicalBucket
from dgc.train.memory import Memory
from dgc.train.reselect import ReselectingBucket
from dgc.train.shared import SharedBucket
from dgc.train.step import Arrival
from dgc.train.uncoded import UncodedBucket
from dgc.train.warmup import density_at


class Patterns:
    """Makes buckets; every rank makes one.

    Args:
        config: with the pattern that is wanted.
        comm: the ranks.
        sizes: elements of the tensors of each bucket that will be compressed.
        device: where the first of them are.
        costs: what to choose by; measured if left out.

    Raises:
        ConfigError: the pattern does not fit the ranks.
    """

    def __init__(
        self,
        config: DGC,
        comm: Communicator,
        sizes: Sequence[tuple[int, ...]],
        device: torch.device,
        costs: Costs | None = None,
    ) -> None:
        self.config, self.comm, self.sizes = config, comm, sizes
        self._chosen: dict[float, str] = {}
        self.hosts, self.costs = self._find_hosts(), costs
        if config.pattern == "auto" and comm.world_size > 1 and sizes and costs is None:
            self.costs = Costs.measure(comm, self.hosts, sizes, config, device)

    def _find_hosts(self) -> Hosts | None:
        if self.config.pattern not in ("auto", "hierarchical") or self.comm.world_size == 1:
            return None
        try:
            return Hosts.of(self.comm)
        except ConfigError:
            if self.config.pattern == "hierarchical":
                raise
            return None

    def choose(self, density: float) -> str:
        """The fastest pattern at `density`; rank 0 says which and why, once."""
        if self.costs is None:
            return "all-gather"
        if density not in self._chosen:
            predicted = predict(self.costs, self.sizes, density, self.config)
            self._chosen[density] = choose(predicted)
            if self.comm.rank == 0:
                print(explain(density, predicted), file=sys.stderr, flush=True)
        return self._chosen[density]

    def bucket(self, layout: Layout) -> Bucket:
        """A bucket with a memory of its own."""
        memory = Memory(layout, self.config, self.comm.rank)
        if self.config.pattern == "auto":
            return AutoBucket(memory, self)
        return self.with_memory(self.config.pattern, memory)

    def with_memory(self, pattern: str, memory: Memory) -> Bucket:
        """A bucket that exchanges by `pattern` what is in `memory`."""
        rank, ranks = self.comm.rank, self.comm.world_size
        if pattern == "hierarchical" and self.hosts is not None:
            return HierarchicalBucket(memory, self.hosts)
        make: dict[str, Callable[[], Bucket]] = {
            "re-selecting": lambda: ReselectingBucket(memory, ranks, rank),
            "shared-indices": lambda: SharedBucket(memory, ranks, rank),
            "dense": lambda: UncodedBucket(memory, ranks),
        }
        return make.get(pattern, lambda: CompressedBucket(memory, ranks))()


class AutoBucket(Bucket):
    """Exchanges by the pattern that is fastest at the density of the step; one memory for all."""

    def __init__(self, memory: Memory, patterns: Patterns) -> None:
        self.layout, self.config, self.patterns = memory.layout, memory.config, patterns
        self._memory = memory
        self._use("all-gather")

    def _use(self, pattern: str) -> None:
        self._now = self.patterns.with_memory(pattern, self._memory)

    @property
    def pattern(self) -> Pattern:  # type: ignore[override]
        return self._now.pattern

    def masked(self, step: int) -> list[float]:
        return self._now.masked(step)

    def density(self, step: int) -> float:
        return self._now.density(step)

    def send(
        self,
        grads: Sequence[Tensor] | None,
        rows: Sequence[Row],
        used: Sequence[bool],
        step: int,
    ) -> Tensor:
        wanted = self.patterns.choose(density_at(step, self.config))
        if wanted != self._now.pattern.name:
            self._use(wanted)
        return self._now.send(grads, rows, used, step)

    def receive_(self, gathered: Tensor, grads: Sequence[Tensor], rows: Sequence[Row]) -> Arrival:
        return self._now.receive_(gathered, grads, rows)

    def applied_(self) -> None:
        self._now.applied_()

    def put_back_(self) -> None:
        self._now.put_back_()

    def forget_(self, index: int) -> None:
        self._now.forget_(index)

    def tensors(self, index: int) -> dict[str, Tensor]:
        return self._now.tensors(index)

    def restored(self) -> None:
        self._now.restored()
