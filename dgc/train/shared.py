"""The bucket of shared indices: one rank chooses by turns, all send the same elements.

Shapes: T tensors in the bucket, n elements in all, K of them sent, P ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgc.comm.exchange import SharedIndices
from dgc.core import SparseBatch, kernels
from dgc.train import wire
from dgc.train.bucket import CompressedBucket, Row, updates
from dgc.train.memory import Memory
from dgc.train.step import Arrival, Sent, message_plan, set_sparse_
from dgc.train.warmup import density_at

_BITS = 1  # of the values in the chooser's message, which nobody reads


class SharedBucket(CompressedBucket):
    """Deep Gradient Compression where rank (step mod P) chooses for all; values travel as fp32."""

    def __init__(self, memory: Memory, world_size: int, rank: int) -> None:
        super().__init__(memory, world_size)
        self.rank = rank
        self.masks *= world_size  # all ranks send the same elements
        self.pattern: SharedIndices = SharedIndices(self._values)

    def send(
        self,
        grads: Sequence[Tensor] | None,
        rows: Sequence[Row],
        used: Sequence[bool],
        step: int,
    ) -> Tensor:
        """The chooser's indices as a message; room for it on the other ranks."""
        self._begin(self.memory, used, step)
        self.pattern.root = step % self.world_size
        memory, numels = self.memory, self.layout.numels
        density = density_at(step, self.config)
        counts = message_plan(numels, density, self.config)[0]
        none = torch.zeros(0, dtype=torch.float32, device=memory.v.device)
        size = wire.max_message_bytes(numels, counts, _BITS, none.device)
        self._sent = Sent(SparseBatch(none.long(), none, (0,) * len(used), numels), none, None)
        self._flags = torch.tensor([*used, False], dtype=torch.float32)
        finite: bool | Tensor = False
        if self.rank != self.pattern.root:
            if grads is not None:
                finite = kernels.accumulate_(
                    grads, memory.u, memory.v, self.layout, updates(rows), memory.seed()
                )
            message = torch.zeros(size, dtype=torch.uint8, device=none.device)
        else:
            batch = self._sent.batch
            if grads is not None:
                finite, batch = self.config.selector.accumulate_select_(
                    *(grads, memory.u, memory.v, self.layout, updates(rows), counts),
                    *(memory.thresholds, memory.seed()),
                )
            message, _ = wire.encode_batch(batch, _BITS, message_bytes=size, finite=finite)
        self._flags[-1] = not bool(finite)
        return message

    def _values(self, message: Tensor) -> Tensor | None:
        """What this rank has at the chosen places, taken out of the memory, and its flags."""
        read = wire.decode_batch(message, self.layout.numels)
        if not read.finite:
            return None
        values = self.memory.at(read.batch)
        batch = read.batch._replace(values=values)
        self._sent = Sent(batch, values, self.memory.release_(batch, values))
        return torch.cat([values, self._flags.to(values.device)])

    def receive_(self, gathered: Tensor, grads: Sequence[Tensor], rows: Sequence[Row]) -> Arrival:
        if not gathered.numel():
            return Arrival(False, (True,) * len(grads))
        assert self._sent is not None, "values were sent"
        sums, flags = gathered.split([self._sent.values.numel(), len(grads) + 1])
        scales = [1 / (self.world_size * row.applied_lr) for row in rows]
        set_sparse_(grads, self._sent.batch._replace(values=sums), scales)
        *used, bad = flags.tolist()
        finite = not bad and bool(sums.isfinite().all())
        return Arrival(finite, tuple(each > 0 for each in used))
