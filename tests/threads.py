"""Ranks as threads of one process: a communicator for tests, which counts what goes through it."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from dgc.comm.base import Done, SelfCommunicator

T = TypeVar("T")


class ThreadCommunicator(SelfCommunicator):
    """Collectives among threads. Results are made by summing and stacking in order of rank."""

    def __init__(
        self, rank: int, barrier: threading.Barrier, slots: list[Any], per_host: int = 1
    ) -> None:
        self.rank, self.world_size = rank, barrier.parties
        self.host = f"host{rank // per_host}"
        self.shared_barrier, self.slots = barrier, slots
        self.sent_bytes = 0
        self.parts: list[ThreadCommunicator] = []

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        everybody: list[Tensor] = self._share(tensor.clone())
        return [each.clone() for each in everybody]

    def _share(self, item: Any) -> list[Any]:
        """What every rank gave."""
        self.slots[self.rank] = item
        self.shared_barrier.wait(timeout=60)
        everybody = list(self.slots)
        self.shared_barrier.wait(timeout=60)
        return everybody

    def all_gather(self, message: Tensor) -> Done:
        self.sent_bytes += message.nbytes
        return Done(torch.stack(self._exchange(message)))

    def all_reduce(self, tensor: Tensor) -> Done:
        self.sent_bytes += tensor.nbytes
        return Done(tensor.copy_(torch.stack(self._exchange(tensor)).sum(dim=0)))

    def reduce_scatter(self, tensor: Tensor) -> Done:
        self.sent_bytes += tensor.nbytes
        return Done(torch.stack(self._exchange(tensor)).sum(dim=0)[self.rank])

    def split(self, color: int) -> "ThreadCommunicator":
        colors = torch.cat(self._exchange(torch.tensor([color]))).tolist()
        members = [rank for rank, each in enumerate(colors) if each == color]
        shared = self._share((threading.Barrier(len(members)), [None] * len(members)))
        part = ThreadCommunicator(members.index(self.rank), *shared[members[0]])
        self.parts.append(part)
        return part

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        sizes = torch.stack(self._exchange(torch.tensor([m.numel() for m in messages])))
        everybody = self._exchange(torch.cat(list(messages)))
        self.sent_bytes += sum(4 + m.nbytes for i, m in enumerate(messages) if i != self.rank)
        return [
            sent.split(row)[self.rank] for sent, row in zip(everybody, sizes.tolist(), strict=True)
        ]

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        self.sent_bytes += tensor.nbytes if self.rank == root else 0
        tensor.copy_(self._exchange(tensor)[root])

    def barrier(self) -> None:
        self.shared_barrier.wait(timeout=60)


def run_ranks(
    world_size: int, body: Callable[[ThreadCommunicator], T], per_host: int = 1
) -> list[T]:
    """What `body(comm)` returns on each rank; the first error of any rank is raised.

    Args:
        per_host: how many ranks share a host.
    """
    barrier = threading.Barrier(world_size)
    slots: list[Any] = [None] * world_size

    def run(rank: int) -> T:
        try:
            # A GPU's gradients are computed by one thread for all, where a rank would wait for others.
            with torch.autograd.set_multithreading_enabled(False):
                return body(ThreadCommunicator(rank, barrier, slots, per_host))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(world_size)]
        errors = [error for error in (f.exception() for f in futures) if error]
        # A broken barrier is only the echo of another rank's error.
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [f.result() for f in futures]
