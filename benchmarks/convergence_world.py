"""N workers in one process, over the library's own pipeline: real messages, real bytes.

The parameters of all ranks are equal bit for bit, so one model serves them all. Each worker has
its own `Reducer`, with its own memory; worker 0's belongs to a real `DistributedOptimizer`.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dgc.comm.base import Done, Handle, SelfCommunicator
from dgc.config import Compression
from dgc.train.bucket import CompressedBucket
from dgc.train.inner import InnerStep
from dgc.train.optimizer import DistributedOptimizer
from dgc.train.reducer import Reducer
from dgc.train.step import Arrival


class Hub:
    """What the workers have sent and worker 0 has not collected yet."""

    def __init__(self, workers: int) -> None:
        self.queues: list[deque[Tensor]] = [deque() for _ in range(workers)]

    def collect(self, own: Tensor) -> list[Tensor]:
        """The payloads of all workers, in order of rank.

        Before training all workers are worker 0: where nobody sent anything, all sent the same.
        """
        others = self.queues[1:]
        if not any(others):
            return [own] * len(self.queues)
        return [own] + [queue.popleft() for queue in others]


class Member(SelfCommunicator):
    """One worker's end of the hub. Only worker 0 waits for what it gathers."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank, self.world_size = hub, rank, len(hub.queues)

    def all_gather(self, message: Tensor) -> Handle:
        return self._send(message, lambda: torch.stack(self.hub.collect(message)))

    def all_reduce(self, tensor: Tensor) -> Handle:
        return self._send(tensor, lambda: torch.stack(self.hub.collect(tensor)).sum(0))

    def _send(self, payload: Tensor, result: Callable[[], Tensor]) -> Handle:
        if self.rank == 0:
            return Later(result)
        self.hub.queues[self.rank].append(payload)
        return Done(payload)


class Later:
    """The handle of a collective that is computed when it is waited for."""

    def __init__(self, result: Callable[[], Tensor]) -> None:
        self.wait = result


class Follower(Reducer):
    """Worker 1 to N−1: sends as every rank does; what arrives is worker 0's to decode."""

    def __init__(self, leader: DistributedOptimizer, comm: Member) -> None:
        inner = InnerStep(leader.optimizer, leader.params, leader.config, comm.world_size)
        super().__init__(leader.params, inner.memory_config, comm, inner.row, enter=inner.enter_)
        self.leader = leader

    def _changed(self) -> list[str]:
        return []  # all have one `.grad`, which by then is worker 0's

    def _receive(self, index: int) -> Arrival:
        return Arrival(self.leader._apply, (True,) * len(self.names[index]))


class World:
    """N workers that train `model` together."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, compression: Compression, workers: int
    ) -> None:
        hub = Hub(workers)
        self.optimizer = DistributedOptimizer(
            optimizer, model.named_parameters(), compression, Member(hub, 0)
        )
        self.followers = [Follower(self.optimizer, Member(hub, i)) for i in range(1, workers)]
        for queue in hub.queues:
            queue.clear()

    def step(self, losses: Sequence[Callable[[], Tensor]], clip: float | None = None) -> float:
        """One training step; `losses[i]()` is the loss of worker i. Returns their mean.

        `clip` is the norm to which the mean gradient is clipped; None does not clip.
        """
        values = []
        for follower, loss in zip(self.followers, losses[1:], strict=True):
            with self.optimizer.no_sync():
                value = loss()
                value.backward()
            values.append(value.detach())
            for name in follower.params:
                follower.ready(name)
            self.optimizer.zero_grad()
        value = losses[0]()
        value.backward()
        if clip is not None:
            self.optimizer.synchronize()
            nn.utils.clip_grad_norm_(self.optimizer.params.values(), clip)
        self.optimizer.step()
        for follower in self.followers:
            follower.finish()
        self.optimizer.zero_grad()
        return float(torch.stack([*values, value.detach()]).mean())

    @torch.no_grad()
    def residual(self) -> dict[str, Tensor]:
        """Mean over workers of what has not been sent, by parameter name."""
        reducers = [self.optimizer.reducer, *self.followers]
        mean: dict[str, Tensor] = {}
        for reducer in reducers:
            for names, bucket in zip(reducer.names, reducer.buckets, strict=True):
                if not isinstance(bucket, CompressedBucket):
                    continue
                for name, part in zip(names, bucket.layout.split(bucket.memory.v), strict=True):
                    part = part.float().view_as(reducer.params[name]) / len(reducers)
                    mean[name] = mean[name] + part if name in mean else part
        return mean
