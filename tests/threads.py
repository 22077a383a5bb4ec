"""Ranks as threads of one process: a communicator for tests, which counts what goes through it."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from dgc.comm.base import Done, SelfCommunicator

T = TypeVar("T")


class ThreadCommunicator(SelfCommunicator):
    """Collectives among threads. Results are made by summing and stacking in order of rank."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Tensor | None]) -> None:
        self.rank, self.world_size = rank, barrier.parties
        self.shared_barrier, self.slots = barrier, slots
        self.sent_bytes = 0

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self.slots[self.rank] = tensor.clone()
        self.shared_barrier.wait(timeout=60)
        everybody = [each.clone() for each in self.slots if each is not None]
        self.shared_barrier.wait(timeout=60)
        return everybody

    def all_gather(self, message: Tensor) -> Done:
        self.sent_bytes += message.nbytes
        return Done(torch.stack(self._exchange(message)))

    def all_reduce(self, tensor: Tensor) -> Done:
        self.sent_bytes += tensor.nbytes
        return Done(tensor.copy_(torch.stack(self._exchange(tensor)).sum(dim=0)))

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        sizes = torch.stack(self._exchange(torch.tensor([m.numel() for m in messages])))
        everybody = self._exchange(torch.cat(list(messages)))
        self.sent_bytes += sum(m.nbytes for m in messages)
        return [
            sent.split(row)[self.rank] for sent, row in zip(everybody, sizes.tolist(), strict=True)
        ]

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        tensor.copy_(self._exchange(tensor)[root])

    def barrier(self) -> None:
        self.shared_barrier.wait(timeout=60)


def run_ranks(world_size: int, body: Callable[[ThreadCommunicator], T]) -> list[T]:
    """What `body(comm)` returns on each rank; the first error of any rank is raised."""
    barrier = threading.Barrier(world_size)
    slots: list[Tensor | None] = [None] * world_size

    def run(rank: int) -> T:
        try:
            return body(ThreadCommunicator(rank, barrier, slots))
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
