"""Patterns: how the payloads of all ranks reach all ranks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dgc.comm.base import Communicator, Handle

_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio's bits as int64: spreads any stride


class Traffic(NamedTuple):
    """Bytes that one exchange moved, as one rank sees it."""

    sent: int
    received: int


class Pattern(Protocol):
    """One way to exchange a payload; `wait` on what `start` returns gives the gathered tensor."""

    name: str

    def start(self, comm: Communicator, payload: Tensor) -> Handle: ...

    def traffic(self, world_size: int, payload_bytes: int) -> Traffic:
        """What the last exchange, of such a payload, gave to the communicator and got from it."""
        ...


class CodedAllGather:
    """Every rank gets every message, `[P, n]`: (P−1)·n bytes; exact, best for few ranks."""

    name = "coded all-gather"

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        return comm.all_gather(payload)

    def traffic(self, world_size: int, payload_bytes: int) -> Traffic:
        return Traffic(payload_bytes, (world_size - 1) * payload_bytes)


class DenseAllReduce:
    """Every rank gets the sum: 2·n·(P−1)/P bytes in a ring."""

    name = "dense all-reduce"

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        return comm.all_reduce(payload)

    def traffic(self, world_size: int, payload_bytes: int) -> Traffic:
        return Traffic(payload_bytes, _ring(world_size, payload_bytes))


class ReselectingAllReduce:
    """Every index has one owner, who sums what all ranks sent for it and keeps the largest sums.

        all-reduce of a small int64 agreement            2·a·(P−1)/P bytes
        all-to-all: 1/P of a rank's K values to each     (P−1)/P · K·b
        owners sum and keep c·K/P values                 nothing
        all-gather of what they kept                     (P−1)/P · c·K·b

    In all about (1 + c)·K·b bytes a rank for values of b bytes, whatever the number of ranks; each
    of the 2·(P−1) messages adds about 30 bytes. What an owner drops goes back into its residual.

    Args:
        route: from the agreement, summed over ranks, to one uint8 message for each owner; None if
            the ranks agree to send nothing.
        merge: from the messages of all ranks for this owner to one, of a size equal on all ranks.

    Source: the balanced regions and second selection of Ok-Topk (Li and Hoefler, PPoPP 2022).
    """

    name = "re-selecting all-reduce"

    def __init__(
        self,
        route: Callable[[Tensor], Sequence[Tensor] | None],
        merge: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        self.route, self.merge = route, merge
        self._moved = Traffic(0, 0)

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        return _Reselection(self, comm, comm.all_reduce(payload))

    def run(self, comm: Communicator, agreement: Tensor) -> Tensor:
        """All but the agreement: the owners' messages `[P, n]`, or `[P, 0]` if nothing is sent."""
        own, peers, size = comm.rank, comm.world_size - 1, agreement.nbytes
        self._moved = Traffic(size, _ring(comm.world_size, size))
        messages = self.route(agreement)
        if messages is None:
            return torch.zeros(comm.world_size, 0, dtype=torch.uint8, device=agreement.device)
        received = comm.all_to_all(messages)
        merged = self.merge(received)
        sizes = 8 * peers + peers * merged.nbytes
        out = sum(m.nbytes for i, m in enumerate(messages) if i != own)
        back = sum(m.nbytes for i, m in enumerate(received) if i != own)
        sent = self._moved.sent + out + 8 * peers + merged.nbytes
        self._moved = Traffic(sent, self._moved.received + back + sizes)
        return comm.all_gather(merged).wait()

    def traffic(self, world_size: int, payload_bytes: int) -> Traffic:
        return self._moved


class _Reselection:
    def __init__(self, pattern: ReselectingAllReduce, comm: Communicator, agreed: Handle) -> None:
        self.pattern, self.comm, self.agreed = pattern, comm, agreed

    def wait(self) -> Tensor:
        return self.pattern.run(self.comm, self.agreed.wait())


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
