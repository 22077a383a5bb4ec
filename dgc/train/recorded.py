"""A bucket's work on a GPU, recorded: its many small operations become one launch.

On the host they take several times as long as on the GPU. They are the same in every step, but for
where the gradients lie, what enters with them, and the seeds; these are uploaded in one piece.
Shapes: T tensors in the bucket, P ranks.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from dgc.core import kernels
from dgc.core.kernels import graph
from dgc.train import arrive
from dgc.train.arrive import Expected
from dgc.train.memory import Memory
from dgc.train.step import Arrival, Sent, receive_, send_
from dgc.train.wire import check_dense

if TYPE_CHECKING:
    from dgc.core.kernels.decode_torch import Decoded

T = TypeVar("T")
_SEEDS = 2
"""As many as `send_` needs."""


class Recorder(Generic[T]):
    """Runs the same work again and again, and records it when it was asked for often enough.

    Attributes:
        unrecorded: how many calls that ask for the same, one after the other, precede a recording.
    """

    unrecorded = 3

    def __init__(self) -> None:
        self._same: object = None
        self._calls = 0
        self._graph: graph.Graph[T] | None = None
        self._refused = False

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def run(self, same: object, work: Callable[[], T], device: torch.device) -> T:
        """What `work` returns; tensors of it are overwritten by the next call.

        Args:
            same: equal in two calls if `work` launches the same, on tensors that have not moved; None
                if it shall not be recorded.
            work: see `graph.Graph`.
            device: where it is launched.
        """
        if same != self._same:
            self._same, self._calls, self._graph = same, 0, None
        self._calls += 1
        often = same is not None and self._calls > self.unrecorded
        if self._graph is None and often and not self._refused:
            self._record(work, device)
        return work() if self._graph is None else self._graph.replay()

    def _record(self, work: Callable[[], T], device: torch.device) -> None:
        try:
            self._graph = graph.Graph(work, device)
        except RuntimeError as error:
            self._refused = True
            warnings.warn(
                f"this GPU's work could not be recorded as a CUDA graph ({error}): training goes on "
                "without, and each step takes some milliseconds more",
                stacklevel=3,
            )


class _Place:
    """A tensor on the device that stays where it is, for what changes from step to step."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0)

    def put(self, values: Tensor, device: torch.device) -> Tensor:
        """`values` there; the host does not wait."""
        if self._tensor.shape != values.shape:
            self._tensor = torch.empty_like(values, device=device)
        return self._tensor.copy_(values, non_blocking=True)


class Sender:
    """`send_` of one memory. What it returns is overwritten by the next call.

    Warm-up is not recorded: a graph keeps the memory of its work, some 320 bytes for each element that
    may be sent, which buckets in turn share otherwise.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.recorder: Recorder[tuple[Tensor, Sent]] = Recorder()
        self._told = _Place()

    def send_(
        self, grads: Sequence[Tensor], update: Tensor, density: float, used: Sequence[bool]
    ) -> tuple[Tensor, Sent]:
        """As `dgc.train.step.send_`."""
        memory, device = self.memory, self.memory.v.device
        there = kernels.codes_there(device) and not graph.recording() and memory.v.numel() > 0
        if not (there and memory.config.selector.recordable):
            return send_(memory, grads, update, density, used)
        entering = kernels.dense(grads)  # held here until the work that reads it is launched
        own = torch.tensor([memory.seed() for _ in range(_SEEDS)])
        facts = kernels.addresses(entering), update.view(-1).view(torch.int64), own
        told = self._told.put(torch.cat(facts), device)
        addresses, rows, seeds = told.split([len(grads), 2 * len(grads), _SEEDS])
        rows = rows.view(torch.float32).view(-1, 4)

        def work() -> tuple[Tensor, Sent]:
            return send_(memory, addresses, rows, density, used, seeds.unbind())

        settled = density == memory.config.density
        return self.recorder.run(tuple(used) if settled else None, work, device)


class Receiver:
    """`receive_` of one bucket."""

    def __init__(self) -> None:
        self._read: Recorder[Decoded] = Recorder()
        self._write: Recorder[None] = Recorder()
        self._messages, self._told = _Place(), _Place()

    def receive_(
        self,
        messages: Tensor,
        grads: Sequence[Tensor],
        scales: Sequence[float],
        expected: Expected | None,
    ) -> Arrival:
        """As `dgc.train.step.receive_`."""
        device, numels = messages.device, tuple(grad.numel() for grad in grads)
        # A part of a hierarchical exchange may hold no tensor.
        there = kernels.codes_there(device) and bool(grads) and grads[0].device == device
        frame = None
        if there and expected is not None and not graph.recording():
            frame = arrive.frame_of(messages, numels, expected)
        if frame is None:
            return receive_(messages, grads, scales)
        check_dense(grads)
        assert expected is not None  # as there is a frame
        kept = self._messages.put(messages, device)
        same = (messages.shape, expected) if expected.settled else None
        found = self._read.run(same, lambda: arrive.read(kept, frame), device)
        verdict = arrive.verdict(found)
        if verdict is None:
            return receive_(messages, grads, scales)
        factors = torch.tensor(scales, dtype=torch.float32).view(torch.int32).long()
        told = self._told.put(torch.cat([kernels.addresses(grads), factors]), device)
        addresses, factors = told.split(len(grads))

        def work() -> None:
            arrive.write_(addresses, factors.int().view(torch.float32), numels, found)

        if self._read.recorded:
            self._write.run(same, work, device)
        else:  # what was found lies elsewhere in each step, and what was recorded looks where it lay
            self._write = Recorder()
            work()
        return Arrival(*verdict)
