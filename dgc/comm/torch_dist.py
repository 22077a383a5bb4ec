"""`Communicator` over a torch.distributed process group (gloo, nccl)."""

import atexit
import ctypes
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions take the default group as a default argument. Imported after the group was made (by
# torch.compile, or by any torch optimizer) they would keep it, and its threads, alive past the end.
import torch.distributed.nn.functional
from torch import Tensor

from dgc.comm.base import Communicator, Handle, SelfCommunicator
from dgc.errors import CommError, ConfigError

T = TypeVar("T")


def _checked(call: Callable[[], T]) -> T:
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"a collective failed: {error}\nAnother rank has probably died or is stuck; "
            "see its own output first, then restart all ranks from the last checkpoint"
        ) from error


# A gloo thread that drops the last reference to a collective's tensors needs the interpreter, and
# ends the process (SIGABRT) if that is already shutting down. So the last ones are never freed, and
# threads that still hold earlier ones get time to let go.
_last: deque[Any] = deque(maxlen=4)


@atexit.register
def _settle() -> None:
    if _last:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_last))
        time.sleep(0.05)


class _Pending:
    def __init__(self, work: Any, result: Tensor, limit: tuple[timedelta, ...]) -> None:
        self.work, self.result, self.limit = work, result, limit

    def wait(self) -> Tensor:
        _checked(lambda: self.work.wait(*self.limit))
        return self.result


class TorchCommunicator:
    """Collectives of a torch.distributed process group.

    Args:
        group: the process group; None is the default one, which must be initialised.
        owner: whether `close` destroys the default process group.
        timeout_seconds: how long a collective may take before `CommError`; None leaves it at the
            group's own timeout, as nccl does in any case.
        device: of nccl's own small tensors, a GPU that no other rank uses: the one of the model. It is
            the current one if left out.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        owner: bool = False,
        timeout_seconds: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.group, self.owner = group, owner
        self._parts: list[TorchCommunicator] = []
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.host = socket.gethostname()
        uses_nccl = dist.get_backend(group) == "nccl"
        self.device = torch.device("cpu")
        if uses_nccl and device is not None and device.type == "cuda":
            self.device = device
        elif uses_nccl:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.timeout = _timeout_of(group, self.device)
        self._limit: tuple[timedelta, ...] = ()  # nccl's wait would make the host wait
        if timeout_seconds is not None and not uses_nccl:
            self.timeout = timedelta(seconds=timeout_seconds)
            self._limit = (self.timeout,)

    def all_gather(self, message: Tensor) -> Handle:
        result = message.new_empty(self.world_size * message.numel())
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        work = _checked(lambda: gather(result, message, group=self.group, async_op=True))
        return self._pending(work, result.view(self.world_size, -1))

    def all_reduce(self, tensor: Tensor) -> Handle:
        work = _checked(lambda: dist.all_reduce(tensor, group=self.group, async_op=True))
        return self._pending(work, tensor)

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        result = torch.empty_like(tensor[0])
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        flat = (result.view(-1), tensor.view(-1))
        work = _checked(lambda: scatter(*flat, group=self.group, async_op=True))
        return self._pending(work, result)

    def _pending(self, work: Any, result: Tensor) -> Handle:
        _last.append(work)
        return _Pending(work, result, self._limit)

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        sent = [m.numel() for m in messages]
        sizes = torch.tensor(sent, dtype=torch.int32, device=self.device)
        received: list[int] = self._exchange(torch.empty_like(sizes), sizes).tolist()
        result = messages[0].new_empty(sum(received))
        self._exchange(result, torch.cat(list(messages)), received, sent)
        return list(torch.split(result, received))

    def _exchange(self, result: Tensor, *args: Any) -> Tensor:
        exchange = partial(dist.all_to_all_single, group=self.group, async_op=True)
        work = _checked(lambda: exchange(result, *args))
        return self._pending(work, result).wait()

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        source = root if self.group is None else dist.get_global_rank(self.group, root)
        group = self.group
        # Bytes, as gloo does not know all dtypes; nccl does not know memory of the CPU.
        whole = tensor.detach().contiguous()
        whole = whole.to(self.device) if self.device.type == "cuda" else whole
        sent = whole.view(-1).view(torch.uint8)
        work = _checked(lambda: dist.broadcast(sent, source, group=group, async_op=True))
        self._pending(work, sent).wait()
        if whole.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(whole)

    def barrier(self) -> None:
        gpu = None if self.device.index is None else [self.device.index]  # nccl guesses one else
        work = _checked(lambda: dist.barrier(group=self.group, async_op=True, device_ids=gpu))
        self._pending(work, torch.empty(0)).wait()

    def split(self, color: int) -> Communicator:
        known = len(dist.distributed_c10d._world.pg_names)
        mine = torch.tensor([color, known], device=self.device)
        rows = self.all_gather(mine).wait().tolist()
        parts: dict[int, list[int]] = {}
        counts: dict[int, set[int]] = {}
        for rank, (theirs, count) in enumerate(rows):
            parts.setdefault(theirs, []).append(self._global_rank(rank))
            counts.setdefault(theirs, set()).add(count)
        # Ranks outside a part do not take part in making it; torch then names the group by `known`.
        # All ranks look at all parts, so that all of them raise.
        for each, members in parts.items():
            if 1 < len(members) < dist.get_world_size() and len(counts[each]) > 1:
                raise ConfigError(
                    f"ranks {members} belong to different numbers of process groups, so that torch "
                    "cannot make one of them alone: make the groups that only some are in after dgc's"
                )
        members = parts[color]
        if len(members) == 1:
            return SelfCommunicator()
        apart = len(members) < dist.get_world_size()
        backend = None if self.group is None else dist.get_backend(self.group)
        group = _checked(
            lambda: dist.new_group(
                members,
                timeout=self.timeout,
                backend=None if backend == "undefined" else backend,
                use_local_synchronization=apart,
            )
        )
        self._parts.append(TorchCommunicator(group, device=self.device))
        return self._parts[-1]

    def duplicate(self) -> Communicator:
        return self if self.world_size == 1 else self.split(0)

    def _global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def close(self) -> None:
        if self.owner and dist.is_initialized():
            self.barrier()  # no rank leaves while another still reads from it
            self._forget_parts()
            dist.destroy_process_group()

    def _forget_parts(self) -> None:
        for part in self._parts:
            part._forget_parts()
            part.group = None  # its threads end with the last reference
        self._parts.clear()


def _timeout_of(group: dist.ProcessGroup | None, device: torch.device) -> timedelta | None:
    """How long a collective of the group may take; None, for torch's default, if it does not say."""
    group = group or dist.group.WORLD
    try:
        found = group._get_backend(device).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, timedelta) else None
