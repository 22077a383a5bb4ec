"""Patterns: how the payloads of all ranks reach all ranks.

Costs in the docstrings: P ranks, α seconds of latency a message, β seconds a byte.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dgc.comm.base import Communicator, Done, Handle
from dgc.comm.hosts import Hosts

T = TypeVar("T")
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio's bits as int64: spreads any stride


class Traffic(NamedTuple):
    """What one exchange moved, as one rank sees it."""

    sent: int
    received: int
    local: int = 0
    """Bytes given to the communicator inside the host, not counted in `sent`."""
    code_seconds: float = 0.0
    """Spent in coding between the stages of the exchange."""


class Pattern(Protocol):
    """One way to exchange a payload; `wait` on what `start` returns gives the gathered tensor."""

    name: str

    def start(self, comm: Communicator, payload: Tensor) -> Handle: ...

    def traffic(self, world_size: int, payload_bytes: int) -> Traffic:
        """What the last exchange, of such a payload, gave to the communicator and got from it."""
        ...


class CodedAllGather:
    """Every rank gets every message, `[P, n]`; exact, best for few ranks.

    Messages of n bytes: (P−1)·(α + n·β); received (P−1)·n bytes.
    """

    name = "all-gather"

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        return comm.all_gather(payload)

    def traffic(self, world_size: int, payload_bytes: int) -> Traffic:
        return Traffic(payload_bytes, (world_size - 1) * payload_bytes)


class DenseAllReduce:
    """Every rank gets the sum.

    A payload of n bytes in a ring: 2·(P−1)·(α + n/P·β); received 2·(P−1)/P·n bytes.
    """

    name = "dense"

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        return comm.all_reduce(payload)

    def traffic(self, world_size: int, payload_bytes: int) -> Traffic:
        return Traffic(payload_bytes, _ring(world_size, payload_bytes))


class _Staged:
    """A pattern of several stages, between which callbacks code; the first may start early."""

    def __init__(self) -> None:
        self._moved = Traffic(0, 0)

    def traffic(self, world_size: int, payload_bytes: int) -> Traffic:
        return self._moved

    def _code(self, function: Callable[..., T], *args: object) -> T:
        start = time.perf_counter()
        result = function(*args)
        self._add(seconds=time.perf_counter() - start)
        return result

    def _add(self, sent: int = 0, received: int = 0, local: int = 0, seconds: float = 0.0) -> None:
        was = self._moved
        self._moved = Traffic(
            was.sent + sent, was.received + received, was.local + local, was.code_seconds + seconds
        )


class _Then:
    """The handle of a first stage and what is to follow once it is waited for."""

    def __init__(self, first: Handle, rest: Callable[[Tensor], Tensor]) -> None:
        self.first, self.rest = first, rest

    def wait(self) -> Tensor:
        return self.rest(self.first.wait())


class Hierarchical(_Staged):
    """Dense inside a host, coded between hosts: each rank of a host codes its part of the sum.

    H hosts of L ranks, α' and β' inside a host, n bytes of gradient, messages of m bytes each:

        reduce-scatter inside                    (L−1)·(α' + n/L·β')
        all-gather of the parts' messages        (H−1)·(α + m·β)
        all-gather of these inside               (L−1)·(α' + H·m·β')

    A rank receives (H−1)·m bytes from other hosts, and all L of a host about what one rank alone
    would in an all-gather among H. Coding takes 1/L of the time.

    Args:
        hosts: which ranks share a host.
        code: from the sum of this rank's part, row `[w]` of the payload `[L, w]`, to its message.
    """

    name = "hierarchical"

    def __init__(self, hosts: Hosts, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hosts, self.code = hosts, code

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        self._moved = Traffic(0, 0, payload.nbytes * self._shared)
        return _Then(self.hosts.inside.reduce_scatter(payload), self._rest)

    @property
    def _shared(self) -> bool:
        """Whether anything travels inside the host."""
        return self.hosts.inside.world_size > 1

    def _rest(self, part: Tensor) -> Tensor:
        """Messages uint8 `[L, H, m]`, by the place of their rank in its host, then by host."""
        message = self._code(self.code, part)
        gathered = self.hosts.between.all_gather(message).wait()
        everything = self.hosts.inside.all_gather(gathered.view(-1)).wait()
        others = self.hosts.between.world_size - 1
        sent = message.nbytes * (others > 0)
        self._add(sent, others * message.nbytes, gathered.nbytes * self._shared)
        return everything.view(-1, *gathered.shape)


class SharedIndices(_Staged):
    """One rank chooses, by turns, which elements all ranks send; their values are summed.

    An index message of i bytes and K fp32 values:

        broadcast of the indices                 ⌈log₂ P⌉·(α + i·β)
        all-reduce of the values                 2·(P−1)·(α + 4·K/P·β)

    A rank receives i + 8·K·(P−1)/P bytes whatever P is.

    Args:
        values: from the chooser's message to the values of this rank, float32; None if the chooser
            has nothing to send.

    Source: the cyclic local top-k of ScaleCom (Chen et al., NeurIPS 2020).
    """

    name = "shared-indices"

    def __init__(self, values: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.values, self.root = values, 0

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        return _Then(Done(payload), lambda message: self._rest(comm, message))

    def _rest(self, comm: Communicator, message: Tensor) -> Tensor:
        comm.broadcast_(message, self.root)
        chooses, size = comm.rank == self.root, message.nbytes
        self._moved = Traffic(size * chooses, size * (not chooses))
        values = self._code(self.values, message)
        if values is None:
            return torch.zeros(0, device=message.device)
        self._add(values.nbytes, _ring(comm.world_size, values.nbytes))
        return comm.all_reduce(values).wait()


class ReselectingAllReduce(_Staged):
    """Every index has one owner, who sums what all ranks sent for it and keeps the largest sums.

    K values of b bytes from each rank, of which owners keep c·K in all, T tensors:

        all-reduce of an int64 agreement         2·(P−1)·(α + 8·(3·T+1)/P·β)
        all-to-all: 1/P of the values to each    2·(P−1)·(α + K/P·b·β), sizes first
        owners sum and keep c·K/P values         nothing
        all-gather of what they kept             (P−1)·(α + c·K/P·b·β)

    A rank receives about (1 + c)·K·b bytes whatever P is, and 30 in each of 2·(P−1) headers. What
    an owner drops goes back into its residual.

    Args:
        route: from the agreement, summed over ranks, to one uint8 message for each owner; None if
            the ranks agree to send nothing.
        merge: from the messages of all ranks for this owner to one, of a size equal on all ranks.

    Source: the balanced regions and second selection of Ok-Topk (Li and Hoefler, PPoPP 2022).
    """

    name = "re-selecting"

    def __init__(
        self,
        route: Callable[[Tensor], Sequence[Tensor] | None],
        merge: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        super().__init__()
        self.route, self.merge = route, merge

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        self._moved = Traffic(payload.nbytes, _ring(comm.world_size, payload.nbytes))
        return _Then(comm.all_reduce(payload), lambda agreement: self._rest(comm, agreement))

    def _rest(self, comm: Communicator, agreement: Tensor) -> Tensor:
        """The owners' messages `[P, n]`, or `[P, 0]` if nothing is sent."""
        own, peers = comm.rank, comm.world_size - 1
        messages = self._code(self.route, agreement)
        if messages is None:
            return torch.zeros(comm.world_size, 0, dtype=torch.uint8, device=agreement.device)
        received = comm.all_to_all(messages)
        merged = self._code(self.merge, received)
        out = sum(m.nbytes for i, m in enumerate(messages) if i != own)
        back = sum(m.nbytes for i, m in enumerate(received) if i != own)
        self._add(out + 4 * peers + merged.nbytes, back + 4 * peers + peers * merged.nbytes)
        return comm.all_gather(merged).wait()


class Regions(NamedTuple):
    """P regions of an index space, balanced wherever the selected elements lie.

    Of each P consecutive elements every rank owns one, rotated by a hash of their place, so that
    neither a run nor a stride of large elements falls to one owner; no counts need be exchanged.

    Attributes:
        numel: elements in all, n.
        world_size: number of regions, P.

    Example:
        >>> owner, place = Regions(10, 4).locate(torch.arange(10))
        >>> place.tolist(), sorted(owner[4:8].tolist())
        ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 2, 3])
    """

    numel: int
    world_size: int

    @property
    def region_numel(self) -> int:
        """Places in each region, ceil(n / P); the last may lie past the end."""
        return -(-self.numel // self.world_size)

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Owner and place in its region of each element, int64."""
        place = indices // self.world_size
        return (indices + self._turn(place)) % self.world_size, place

    def indices(self, owner: int, place: Tensor) -> Tensor:
        """The elements at int64 `place` in the region of `owner`: undoes `locate`."""
        return place * self.world_size + (owner - self._turn(place)) % self.world_size

    def _turn(self, place: Tensor) -> Tensor:
        return (place * _MIX >> 33) % self.world_size


def _ring(world_size: int, payload_bytes: int) -> int:
    return 2 * payload_bytes * (world_size - 1) // world_size
