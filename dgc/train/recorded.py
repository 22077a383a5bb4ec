"""`send_` of a bucket on a GPU, recorded: its hundreds of small operations become one launch.

On the host they take several times as long as on the GPU. They are the same in every step, but for
where the gradients lie, how they enter, and the seeds; these are uploaded in one piece.
Shapes: T tensors in the bucket.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgc.core import kernels
from dgc.core.kernels import graph
from dgc.train.memory import Memory
from dgc.train.step import Sent, send_

_SEEDS = 2
"""As many as `send_` needs."""


class Sender:
    """Calls `send_`, and on a GPU records it when it is asked for the same again and again.

    What it returns is overwritten by the next call.

    Attributes:
        unrecorded: how many calls that ask for the same, one after the other, precede a recording.
            The density changes step by step during warm-up.
    """

    unrecorded = 3

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._same: tuple[float, tuple[bool, ...]] | None = None
        self._calls = 0
        self._graph: graph.Graph[tuple[Tensor, Sent]] | None = None
        self._told: Tensor | None = None

    def send_(
        self, grads: Sequence[Tensor], update: Tensor, density: float, used: Sequence[bool]
    ) -> tuple[Tensor, Sent]:
        """As `dgc.train.step.send_`."""
        memory = self.memory
        there = kernels.codes_there(memory.v.device)
        if not (there and memory.config.selector.recordable) or graph.recording():
            return send_(memory, grads, update, density, used)
        entering = kernels.dense(grads)  # held here until the work that reads it is launched
        told = self._tell(kernels.addresses(entering), update)
        addresses, rows, seeds = told.split([len(grads), 2 * len(grads), _SEEDS])
        rows = rows.view(torch.float32).view(-1, 4)

        def work() -> tuple[Tensor, Sent]:
            return send_(memory, addresses, rows, density, used, seeds.unbind())

        same = density, tuple(used)
        if same != self._same:
            self._same, self._calls, self._graph = same, 0, None
        self._calls += 1
        if self._calls <= self.unrecorded:
            return work()
        if self._graph is None:
            self._graph = graph.Graph(work)
        return self._graph.replay()

    def _tell(self, addresses: Tensor, update: Tensor) -> Tensor:
        """Addresses, rows and seeds on the device, int64 `[T + 2·T + 2]`, always at the same place."""
        seeds = torch.tensor([self.memory.seed() for _ in range(_SEEDS)])
        told = torch.cat([addresses, update.view(-1).view(torch.int64), seeds])
        if self._told is None:
            self._told = torch.empty_like(told, device=self.memory.v.device)
        return self._told.copy_(told, non_blocking=True)
