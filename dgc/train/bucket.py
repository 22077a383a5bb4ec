"""A bucket of parameters that travel in one message: compressed, or dense, its sibling."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dgc.comm.exchange import CodedAllGather, DenseAllReduce, Pattern
from dgc.core.layout import Layout
from dgc.train.arrive import Expected
from dgc.train.memory import Memory
from dgc.train.recorded import Receiver, Sender
from dgc.train.step import Arrival, Sent, abstain, message_plan
from dgc.train.warmup import density_at


class Row(NamedTuple):
    """How the gradient of one parameter enters the memory in this step."""

    momentum: float = 0.0
    gain: float = 1.0
    """Factor of the gradient: clipping and dampening."""
    lr: float = 1.0
    """Factor of what is accumulated."""
    nesterov: bool = False
    applied_lr: float = 1.0
    """What the optimizer will multiply the mean by; divided out before."""


def updates(rows: Sequence[Row]) -> Tensor:
    """What `kernels.accumulate_` reads: float32 `[T, 4]`, rows (m, c, lr, nesterov)."""
    return torch.tensor([row[:4] for row in rows], dtype=torch.float32)


class Bucket(Protocol):
    """Gradients to payload, and gathered payloads to mean gradients.

    What returns nothing does nothing unless it is overridden.
    """

    layout: Layout
    pattern: Pattern

    def masked(self, step: int) -> list[float]:
        """Of each tensor the share of all ranks' momentum that `step` cleared where it arrived."""
        return [0.0] * len(self.layout.numels)

    def density(self, step: int) -> float:
        """The share of its elements that the bucket sends in training step `step`."""
        ...

    def send(
        self,
        grads: Sequence[Tensor] | None,
        rows: Sequence[Row],
        used: Sequence[bool],
        step: int,
    ) -> Tensor:
        """The payload of this rank. `grads` None: this rank's whole gradient is not finite."""
        ...

    def receive_(self, gathered: Tensor, grads: Sequence[Tensor], rows: Sequence[Row]) -> Arrival:
        """Overwrite `grads`, contiguous float32, with the mean over ranks."""
        ...

    def applied_(self) -> None:
        """All ranks apply this step."""
        return

    def put_back_(self) -> None:
        """All ranks skip this step: what was sent returns to the memory."""
        return

    def forget_(self, index: int) -> None:
        """No rank used tensor `index`: its state becomes what it was before `send`."""
        return

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Views of the state of tensor `index`."""
        ...

    def restored(self) -> None:
        """The state was written to from outside."""
        return


class CompressedBucket(Bucket):
    """Deep Gradient Compression: the largest accumulated values, coded."""

    def __init__(self, memory: Memory, world_size: int) -> None:
        self.memory, self.world_size = memory, world_size
        self.layout, self.config = memory.layout, memory.config
        self.pattern: Pattern = CodedAllGather()
        self.masks = self.config.momentum_masking / world_size  # by one rank, where it sends
        self._sender, self._receiver = Sender(memory), Receiver()
        self._sent: Sent | None = None
        self._expected: Expected | None = None
        self._before: dict[int, dict[str, Tensor]] = {}

    def masked(self, step: int) -> list[float]:
        if not self.masks:
            return super().masked(step)
        numels = self.layout.numels
        counts = message_plan(numels, self.density(step), self.config)[0]
        # What is sent whole, all ranks send.
        return [1.0 if n == k else self.masks for n, k in zip(numels, counts, strict=True)]

    def density(self, step: int) -> float:
        return density_at(step, self.config)

    def send(
        self,
        grads: Sequence[Tensor] | None,
        rows: Sequence[Row],
        used: Sequence[bool],
        step: int,
    ) -> Tensor:
        self._begin(self.memory, used, step)
        density = density_at(step, self.config)
        counts = message_plan(self.layout.numels, density, self.config, self.memory.v.device)[0]
        settled = density == self.config.density
        self._expected = Expected(self.config.value_bits, sum(counts), settled)
        if grads is None:
            message, self._sent = abstain(self.memory, density)
        else:
            message, self._sent = self._sender.send_(grads, updates(rows), density, used)
        return message

    def _begin(self, memory: Memory, used: Sequence[bool], step: int) -> None:
        memory.begin(step)
        unused = [index for index, yes in enumerate(used) if not yes]
        self._before = {i: {k: t.clone() for k, t in self.tensors(i).items()} for i in unused}

    def receive_(self, gathered: Tensor, grads: Sequence[Tensor], rows: Sequence[Row]) -> Arrival:
        scales = [1 / (self.world_size * row.applied_lr) for row in rows]
        return self._receiver.receive_(gathered, grads, scales, self._expected)

    def put_back_(self) -> None:
        assert self._sent is not None, "put_back_ undoes a send"
        self.memory.put_back_(*self._sent)

    def forget_(self, index: int) -> None:
        for name, state in self.tensors(index).items():
            state.copy_(self._before[index][name])

    def tensors(self, index: int) -> dict[str, Tensor]:
        return self.memory.tensors(index)


class DenseBucket(Bucket):
    """No compression: the mean of all gradients, one flag a tensor riding behind them."""

    def __init__(self, layout: Layout, dtype: torch.dtype, world_size: int) -> None:
        self.layout, self.dtype, self.world_size = layout, dtype, world_size
        self.pattern: Pattern = DenseAllReduce()
        self._payload: Tensor | None = None

    def density(self, step: int) -> float:
        return 1.0

    def send(
        self,
        grads: Sequence[Tensor] | None,
        rows: Sequence[Row],
        used: Sequence[bool],
        step: int,
    ) -> Tensor:
        numel, device = self.layout.offsets[-1], self.layout.table.device
        if self._payload is None:  # kept: new memory costs as much time as a pass over it
            self._payload = torch.empty(numel + len(used), dtype=self.dtype, device=device)
        payload = self._payload
        if grads is None:
            return payload.fill_(torch.nan)
        for out, grad, row in zip(self.layout.split(payload[:numel]), grads, rows, strict=True):
            torch.mul(grad.reshape(-1).float(), row.gain / self.world_size, out=out)
        payload[numel:] = torch.tensor(used, device=device)
        return payload

    def receive_(self, gathered: Tensor, grads: Sequence[Tensor], rows: Sequence[Row]) -> Arrival:
        numel = self.layout.offsets[-1]
        for grad, mean in zip(grads, self.layout.split(gathered[:numel]), strict=True):
            grad.view(-1).copy_(mean)
        # A sum is finite only if every term is; fp32 terms of a sane gradient do not overflow it.
        finite = bool(gathered.sum(dtype=torch.float32).isfinite())
        return Arrival(finite, tuple((gathered[numel:] > 0).tolist()))

    def tensors(self, index: int) -> dict[str, Tensor]:
        return {}
