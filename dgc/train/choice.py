"""Which pattern is fastest on this job's own links: measured costs, a model, a choice."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.comm.base import Communicator, Done, Handle, SelfCommunicator
from dgc.comm.cost import Links
from dgc.comm.hosts import Hosts
from dgc.config import DGC
from dgc.core.layout import Layout
from dgc.train.bucket import CompressedBucket
from dgc.train.measure import Cost, largest, measure
from dgc.train.memory import Memory
from dgc.train.reselect import KEPT
from dgc.train.step import message_plan
from dgc.train.uncoded import UncodedBucket

_SAMPLE = 1 << 22  # elements to time the coding of
_DENSITIES = (0.001, 0.05)
BY_NAME = ("shared-indices",)
"""Never chosen: what is lost in accuracy is not in a prediction of time (docs/log.md, 2026-11-26)."""

_HEADER = 30  # bytes of a message without values, about


class Coding(NamedTuple):
    """Seconds of coding on one rank while all ranks code."""

    element: float
    """Accumulating and selecting, for each element of the gradient."""
    sent: float
    """Encoding, for each value sent."""
    clear: float
    """Writing the mean, for each element."""
    arrived: float
    """Decoding, for each value that arrives."""
    dense: float
    """All that surrounds a dense exchange, for each element."""


class Costs(NamedTuple):
    """What a job's exchanges are made of.

    Attributes:
        ranks: P, of the whole job.
        hosts: H; ranks of one host are `ranks / hosts`.
        links: among all ranks.
        inside: among the ranks of one host; None if each host has one.
        between: among ranks of the same place in each host; None on one host.
        coding: on each rank.
    """

    ranks: int
    hosts: int
    links: Links
    inside: Links | None
    between: Links | None
    coding: Coding

    @classmethod
    def measure(
        cls,
        comm: Communicator,
        hosts: Hosts | None,
        sizes: Sequence[tuple[int, ...]],
        config: DGC,
        device: torch.device,
    ) -> "Costs":
        """Measure links and coding; every rank calls it, two at least. Takes about a second.

        Args:
            comm: all ranks.
            hosts: who shares a host; None if hosts differ in their number of ranks.
            sizes: elements of the tensors of each bucket.
            config: what training will use.
            device: where the gradients are.
        """
        links, inside, between, count = Links.measure(comm, device), None, None, comm.world_size
        if hosts is not None:
            count = hosts.between.world_size
            if count > 1 and hosts.inside.world_size > 1:
                inside = Links.measure(hosts.inside, device)
                between = Links.measure(hosts.between, device)
        coding = coding_of(comm, sizes, config, device)
        return cls._agreed(cls(comm.world_size, count, links, inside, between, coding), comm)

    @staticmethod
    def _agreed(costs: "Costs", comm: Communicator) -> "Costs":
        """Inside and between differ among groups of ranks: all take the slowest."""
        found = []
        for pair in (costs.inside, costs.between):
            if pair is not None:
                values = torch.tensor([*pair.gather, *pair.reduce], dtype=torch.float64)
                a, b, c, d = largest(values, comm)
                pair = Links(
                    pair.gather._replace(latency=a, byte_seconds=b),
                    pair.reduce._replace(latency=c, byte_seconds=d),
                )
            found.append(pair)
        return costs._replace(inside=found[0], between=found[1])


class Echo(SelfCommunicator):
    """Every rank sends what this one sends, at no cost."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def all_gather(self, message: Tensor) -> Handle:
        return Done(message.repeat(self.world_size, 1))


def coding_of(
    comm: Communicator, sizes: Sequence[tuple[int, ...]], config: DGC, device: torch.device
) -> Coding:
    """Time the coding of a sample of the largest bucket on `device`; every rank calls it."""
    numels = _sample(max(sizes, key=sum))
    numel = sum(numels)
    found: list[tuple[int, Cost]] = []
    echo = Echo(comm.world_size)
    for density in _DENSITIES:
        sample = replace(config, density=density, warmup_steps=0)
        memory = Memory(Layout.of(numels, device), sample)
        comm.barrier()
        cost = measure(CompressedBucket(memory, comm.world_size), echo, device, 3)
        found.append((sum(message_plan(numels, density, sample)[0]), cost))
    comm.barrier()
    dense = measure(UncodedBucket(memory, comm.world_size), echo, device, 3)
    (few, sparse), (many, denser) = found
    more = max(1, many - few)
    arrived = (denser.decode_seconds - sparse.decode_seconds) / (more * comm.world_size)
    encoding = sparse.code_seconds - sparse.decode_seconds
    sent = (denser.code_seconds - denser.decode_seconds - encoding) / more
    own = torch.tensor(
        [
            (encoding - few * sent) / max(1, numel),
            sent,
            (sparse.decode_seconds - few * comm.world_size * arrived) / max(1, numel),
            arrived,
            dense.code_seconds / max(1, numel),
        ],
        dtype=torch.float64,
    )
    return Coding(*largest(own.clamp(min=0), comm))


def _sample(numels: tuple[int, ...]) -> tuple[int, ...]:
    """As many elements as fit, tensor by tensor; a part of the last.

    Example:
        >>> _sample((10, 20, 1 << 23))
        (10, 20, 4194274)
    """
    kept: list[int] = []
    for numel in numels:
        kept.append(min(numel, _SAMPLE - sum(kept)))
        if sum(kept) == _SAMPLE:
            break
    return tuple(kept)


def predict(
    costs: Costs, sizes: Sequence[tuple[int, ...]], density: float, config: DGC
) -> dict[str, float]:
    """Seconds that the exchange of all buckets takes by each pattern, with nothing overlapped.

    Args:
        costs: of the job.
        sizes: elements of the tensors of each bucket.
        density: share of the elements that is sent.
        config: the width of values, and how many of a tensor are sent at least.
    """
    totals: dict[str, float] = {}
    for numels in sizes:
        for name, seconds in _bucket(costs, tuple(numels), density, config).items():
            totals[name] = totals.get(name, 0.0) + seconds
    return totals


def _bucket(costs: Costs, numels: tuple[int, ...], density: float, config: DGC) -> dict[str, float]:
    ranks, coding, (gather, reduce) = costs.ranks, costs.coding, costs.links
    counts, size = message_plan(numels, density, config)
    n, k = sum(numels), sum(counts)

    def code(sent: float, arrived: float, part: float = 1.0) -> float:
        encode = part * (coding.element * n + coding.sent * sent)
        return encode + coding.clear * n + coding.arrived * arrived

    kept = min(KEPT, ranks)
    index_bytes = size - k * (config.value_bits - 1) / 8
    found = {
        "all-gather": code(k, ranks * k) + gather.all_gather(ranks, size),
        "dense": coding.dense * n + reduce.all_reduce(ranks, 4 * n),
        "shared-indices": code(k, k)
        + gather.broadcast(ranks, index_bytes)
        + reduce.all_reduce(ranks, 4 * k),
        "re-selecting": code(k * (1 + kept / ranks), (1 + kept) * k)
        + reduce.all_reduce(ranks, 8 * (3 * len(numels) + 1))
        + gather.all_to_all(ranks, 4 * ranks)
        + gather.all_to_all(ranks, size + _HEADER * ranks)
        + gather.all_gather(ranks, size * kept / ranks + _HEADER),
    }
    if costs.inside is not None and costs.between is not None:
        local = ranks // costs.hosts
        found["hierarchical"] = (
            code(k, costs.hosts * k, 1 / local)
            + coding.dense * n
            + costs.inside.reduce.reduce_scatter(local, 4 * n)
            + costs.between.gather.all_gather(costs.hosts, size / local)
            + costs.inside.gather.all_gather(local, costs.hosts * size / local)
        )
    return found


def choose(predicted: Mapping[str, float]) -> str:
    """The pattern of least predicted time but for those of `BY_NAME`; of equal ones the first.

    Example:
        >>> choose({"all-gather": 0.2, "dense": 0.1})
        'dense'
    """
    return min((name for name in predicted if name not in BY_NAME), key=predicted.__getitem__)


def explain(density: float, predicted: Mapping[str, float]) -> str:
    """One line: which pattern, and the predicted time of each.

    Example:
        >>> explain(0.25, {"all-gather": 0.2, "dense": 0.1})
        'dgc: at density 0.25 dense, predicted 100 ms an exchange; all-gather 200 ms'
    """
    best = choose(predicted)
    others = sorted((time, name) for name, time in predicted.items() if name != best)
    rest = ", ".join(f"{name} {1e3 * time:.3g} ms" for time, name in others)
    mine = f"{1e3 * predicted[best]:.3g} ms an exchange"
    return f"dgc: at density {density:.3g} {best}, predicted {mine}; {rest}"
