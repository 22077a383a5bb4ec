"""The bucket that sends all of what it has: where compression would take longer than it saves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgc.comm.exchange import DenseAllReduce
from dgc.core import kernels
from dgc.train.bucket import CompressedBucket, Row, updates
from dgc.train.memory import Memory
from dgc.train.step import Arrival


class UncodedBucket(CompressedBucket):
    """The whole residual as fp32, dense; nothing is masked, as then no momentum would be left.

    The memory is that of Deep Gradient Compression, so steps of both kinds may follow one another.
    """

    def __init__(self, memory: Memory, world_size: int) -> None:
        super().__init__(memory, world_size)
        self.pattern, self.masks = DenseAllReduce(), 0.0
        # Kept: new memory of this size costs as much time as a pass over it.
        numel, device = memory.v.numel() + len(memory.layout.numels) + 1, memory.v.device
        self._payload = torch.empty(numel, dtype=torch.float32, device=device)

    def density(self, step: int) -> float:
        return 1.0

    def send(
        self,
        grads: Sequence[Tensor] | None,
        rows: Sequence[Row],
        used: Sequence[bool],
        step: int,
    ) -> Tensor:
        """v, and behind it flags: of each tensor, who used it, and last who is not finite."""
        self._begin(self.memory, used, step)
        memory, payload, numel = self.memory, self._payload, self.layout.offsets[-1]
        finite = grads is not None and kernels.accumulate_(
            grads, memory.u, memory.v, self.layout, updates(rows), memory.seed()
        )
        payload[:numel] = memory.v
        payload[numel:] = torch.tensor([*used, not finite])
        return payload

    def receive_(self, gathered: Tensor, grads: Sequence[Tensor], rows: Sequence[Row]) -> Arrival:
        sums, flags = gathered.split([self.layout.offsets[-1], len(grads) + 1])
        for grad, each, row in zip(grads, self.layout.split(sums), rows, strict=True):
            torch.mul(each, 1 / (self.world_size * row.applied_lr), out=grad.view(-1))
        *used, bad = flags.tolist()
        finite = not bad and bool(sums.sum().isfinite())
        return Arrival(finite, tuple(each > 0 for each in used))

    def applied_(self) -> None:
        self.memory.v.zero_()

    def put_back_(self) -> None:
        """Nothing was taken out."""
