"""What the library asks of a communication backend, and the world of one that needs none."""

import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from dgc.errors import CommError

_POLL_SECONDS = 50e-6


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor:
        """Block until it is done and return its result; `CommError` if it failed or timed out."""
        ...


class Communicator(Protocol):
    """Collectives among `world_size` ranks; every rank calls the same ones in the same order.

    Tensors are contiguous. A backend keeps the tensors of a collective alive until `wait` returns.
    All failures, a dead rank and a timeout among them, are raised as `CommError`.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device:
        """Where the tensors of small messages should lie; CUDA tensors are always accepted too."""
        ...

    @property
    def host(self) -> str:
        """The name of the machine; ranks of one machine reach one another at memory speed."""
        ...

    def all_gather(self, message: Tensor) -> Handle:
        """Start gathering one tensor `[n]`, equal in size and dtype on all ranks, as `[P, n]`."""
        ...

    def all_reduce(self, tensor: Tensor) -> Handle:
        """Start summing `tensor` over ranks, in place; fp32, fp16, bf16, int64."""
        ...

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        """Start summing `[P, n]` over ranks; rank i gets row i, `[n]`."""
        ...

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        """Send `messages[i]` (uint8 `[n_i]`, any sizes) to rank i; returns what ranks sent here."""
        ...

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite `tensor` with that of rank `root`."""
        ...

    def barrier(self) -> None:
        """Return once every rank has called it."""
        ...

    def split(self, color: int) -> "Communicator":
        """The communicator of the ranks that gave the same `color`, in order of rank."""
        ...

    def duplicate(self) -> "Communicator":
        """One of the same ranks, whose collectives need no order with those of this one."""
        ...

    def close(self) -> None:
        """Free what this communicator opened."""
        ...


class Twins:
    """Duplicates of communicators, each lent to one user at a time."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Communicator, list[Communicator]] = WeakKeyDictionary()
        self._free: WeakSet[Communicator] = WeakSet()

    def lend(self, comm: Communicator) -> Communicator:
        """A duplicate of `comm` that nobody uses; every rank calls it.

        Ranks give back when their garbage collectors run, so one is lent again once it is free on
        all.
        """
        made = self._made.setdefault(comm, [])
        free = [int(twin in self._free) for twin in made]
        mine = torch.tensor(free, dtype=torch.uint8, device=comm.device)
        everywhere = comm.all_gather(mine).wait().all(dim=0).tolist() if made else []
        for twin, unused in zip(made, everywhere, strict=True):
            if unused:
                self._free.remove(twin)
                return twin
        twin = comm.duplicate()
        if twin is not comm:
            made.append(twin)
        return twin

    def give_back(self, twin: Communicator) -> None:
        """It may be lent again; nothing is under way."""
        if any(twin in made for made in self._made.values()):
            self._free.add(twin)


def poll(done: Callable[[], bool], timeout_seconds: float) -> None:
    """Return once a collective is `done`, for backends that wait for ever for a rank that died.

    Raises:
        CommError: it took longer than `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    while not done():
        if time.monotonic() > deadline:
            raise CommError(
                f"a collective did not end within {timeout_seconds:.0f} s: another rank has "
                "probably died or is stuck. Restart all ranks from the last checkpoint, or raise "
                "timeout_seconds in dgc.init if a step takes that long"
            )
        time.sleep(_POLL_SECONDS)


class Done:
    """The handle of a collective that is already complete."""

    def __init__(self, result: Tensor) -> None:
        self.result = result

    def wait(self) -> Tensor:
        return self.result


class SelfCommunicator:
    """A world of one: nothing is sent.

    Example:
        >>> SelfCommunicator().all_gather(torch.tensor([7], dtype=torch.uint8)).wait().tolist()
        [[7]]
    """

    rank = 0
    world_size = 1
    device = torch.device("cpu")
    host = socket.gethostname()

    def all_gather(self, message: Tensor) -> Handle:
        return Done(message.unsqueeze(0))

    def all_reduce(self, tensor: Tensor) -> Handle:
        return Done(tensor)

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        return Done(tensor[0])

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        return [messages[0]]

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        pass

    def barrier(self) -> None:
        pass

    def split(self, color: int) -> Communicator:
        return self

    def duplicate(self) -> Communicator:
        return self

    def close(self) -> None:
        pass
