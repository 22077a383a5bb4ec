"""The bucket of several ranks a host: they sum their gradients, and each codes its part of the sum.

Shapes: T tensors in the bucket, n elements in all; H hosts of L ranks, P = H·L; parts of
q = ceil(n / L) elements.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dgc.comm.exchange import Hierarchical
from dgc.comm.hosts import Hosts
from dgc.core import SparseBatch, kernels
from dgc.core.layout import Layout
from dgc.train import wire
from dgc.train.arrive import Expected
from dgc.train.bucket import CompressedBucket, Row, updates
from dgc.train.memory import Memory
from dgc.train.recorded import Receiver, Sender
from dgc.train.step import Arrival, Sent, message_plan
from dgc.train.warmup import density_at


class Piece(NamedTuple):
    """The run of one tensor that lies in a part: its elements [begin, end)."""

    tensor: int
    begin: int
    end: int


def pieces_of(layout: Layout, start: int, stop: int) -> list[Piece]:
    """The pieces of tensors between two places of the flat state.

    Example:
        >>> [tuple(piece) for piece in pieces_of(Layout.of([3, 2, 4]), 2, 6)]
        [(0, 2, 3), (1, 0, 2), (2, 0, 1)]
    """
    found = []
    for index, (first, numel) in enumerate(zip(layout.offsets, layout.numels, strict=False)):
        begin, end = max(start - first, 0), min(stop - first, numel)
        if begin < end:
            found.append(Piece(index, begin, end))
    return found


class HierarchicalBucket(CompressedBucket):
    """Deep Gradient Compression of the sum over a host's ranks, of which each holds one part.

    Of u and v a rank uses its own part; elsewhere they are zero. Sums and not means enter, so that
    Σ over ranks of v means the same as with every other pattern.
    """

    def __init__(self, memory: Memory, hosts: Hosts) -> None:
        super().__init__(memory, hosts.inside.world_size * hosts.between.world_size)
        self.hosts, self.pattern = hosts, Hierarchical(hosts, self._message)
        self.masks *= hosts.inside.world_size  # one u has the momentum of a whole host
        ranks, numel = hosts.inside.world_size, self.layout.offsets[-1]
        self.room = -(-numel // ranks)
        self.starts = [min(i * self.room, numel) for i in range(ranks + 1)]
        self.parts = [pieces_of(self.layout, *self.starts[i : i + 2]) for i in range(ranks)]
        device, own = self.layout.table.device, hosts.inside.rank
        self.part = memory.part(Layout.of(self._numels(own), device), self.starts[own])
        self._sender, self._receivers = Sender(self.part), [Receiver() for _ in self.parts]
        self._payload: Tensor | None = None
        self.restored()

    def _numels(self, part: int) -> tuple[int, ...]:
        return tuple(piece.end - piece.begin for piece in self.parts[part])

    def restored(self) -> None:
        """A memory of another pattern or place: its parts must go to their ranks first."""
        self._at_home = False

    def send(
        self,
        grads: Sequence[Tensor] | None,
        rows: Sequence[Row],
        used: Sequence[bool],
        step: int,
    ) -> Tensor:
        """Of each part a row `[q + T]`: the gradient, scaled, and who used which tensor."""
        if not self._at_home:
            self.memory.begin(step)
            self._go_home()
        self._rows, self._step, self._density = rows, step, density_at(step, self.config)
        if self._payload is None:  # kept: new memory costs as much time as a pass over it
            device = self.part.v.device
            self._payload = torch.zeros(
                len(self.parts), self.room + len(used), dtype=torch.float32, device=device
            )
            self._flat = torch.empty(self.layout.offsets[-1], dtype=torch.float32, device=device)
        payload, flat = self._payload, self._flat
        payload[:, self.room :] = torch.tensor(used, dtype=torch.float32)
        if grads is None:
            flat.fill_(torch.nan)
        else:
            for out, grad, row in zip(self.layout.split(flat), grads, rows, strict=True):
                torch.mul(grad.reshape(-1).float(), row.gain, out=out)
        for row_, start, stop in zip(payload, self.starts, self.starts[1:], strict=False):
            row_[: stop - start] = flat[start:stop]
        return payload

    def _go_home(self) -> None:
        memory, own, numel = self.memory, self.hosts.inside.rank, self.layout.offsets[-1]
        for state in (memory.u, memory.v):
            if state is not None:
                padded = F.pad(state.float(), (0, self.room * len(self.parts) - numel))
                rows = padded.view(len(self.parts), self.room)
                mine = self.hosts.inside.reduce_scatter(rows).wait()
                places = torch.arange(*self.starts[own : own + 2], device=state.device)
                kernels.add_(state.zero_(), places, mine[: self._width], memory.seed())
        self._at_home = True

    @property
    def _width(self) -> int:
        return self.part.v.numel()

    def _message(self, summed: Tensor) -> Tensor:
        """The part's message, of a size equal for all parts."""
        part, pieces, density = self.part, self.parts[self.hosts.inside.rank], self._density
        used = [each > 0 for each in summed[self.room :].tolist()]
        self._begin(self.part, used, self._step)
        rows = [self._rows[piece.tensor]._replace(gain=1.0) for piece in pieces]
        numels, none = part.layout.numels, torch.zeros(0, dtype=torch.float32, device=summed.device)
        empty = SparseBatch(none.long(), none, (0,) * len(numels), numels)
        message, self._sent = (
            self._sender.send_(
                part.layout.split(summed[: self._width]),
                updates(rows),
                density,
                [used[piece.tensor] for piece in pieces],
            )
            if pieces
            else (wire.encode_batch(empty, 1, message_bytes=64)[0], Sent(empty, none, None))
        )
        sizes = [
            message_plan(self._numels(i), density, self.config, summed.device)[1]
            for i in range(len(self.parts))
        ]
        return F.pad(message, (0, max(64, *sizes) - message.numel()))

    def receive_(self, gathered: Tensor, grads: Sequence[Tensor], rows: Sequence[Row]) -> Arrival:
        finite, everyone = True, [False] * len(grads)
        for part, (messages, pieces) in enumerate(zip(gathered, self.parts, strict=True)):
            runs = [grads[p.tensor].view(-1)[p.begin : p.end] for p in pieces]
            scales = [1 / (self.world_size * rows[p.tensor].applied_lr) for p in pieces]
            plan = message_plan(self._numels(part), self._density, self.config, messages.device)
            settled = self._density == self.config.density
            expected = Expected(self.config.value_bits, sum(plan[0]), settled)
            arrival = self._receivers[part].receive_(messages, runs, scales, expected)
            finite &= arrival.finite
            for piece, used in zip(pieces, arrival.used, strict=True):
                everyone[piece.tensor] |= used
        # An empty tensor has no piece, and is as good as used.
        return Arrival(
            finite, tuple(u or not n for u, n in zip(everyone, self.layout.numels, strict=True))
        )

    def put_back_(self) -> None:
        assert self._sent is not None, "put_back_ undoes a send"
        self.part.put_back_(*self._sent)
