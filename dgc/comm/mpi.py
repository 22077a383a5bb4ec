"""`Communicator` over mpi4py; CUDA tensors are staged through host memory."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgc.comm.base import Communicator, Handle
from dgc.errors import CommError, ConfigError, MissingPackageError

_POLL_SECONDS = 50e-6
# 16-bit floats have no MPI sum: they travel as fp32.
_SUMMED_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def import_mpi() -> Any:
    """mpi4py's MPI module; importing it initialises MPI."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MissingPackageError(
            f"mpi4py cannot be imported ({error}): pip install 'dgc[mpi]'"
        ) from error
    return MPI


def _host(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a contiguous CPU tensor, shared."""
    return tensor.view(-1).view(torch.uint8).numpy()


class _Pending:
    """Polls with a deadline, so that a rank that died without a word cannot hang the others."""

    def __init__(
        self, request: Any, kept: tuple[Any, ...], result: Tensor, like: Tensor, timeout: float
    ) -> None:
        self.request, self.kept = request, kept
        self.result, self.like, self.timeout = result, like, timeout

    def wait(self) -> Tensor:
        deadline = time.monotonic() + self.timeout
        while not self.request.Test():
            if time.monotonic() > deadline:
                raise CommError(
                    f"a collective did not end within {self.timeout:.0f} s: another rank has "
                    "probably died or is stuck. Restart all ranks from the last checkpoint, or "
                    "raise timeout_seconds in dgc.init if a step takes that long"
                )
            time.sleep(_POLL_SECONDS)
        self.kept = ()
        return self.result.to(self.like.device, self.like.dtype)


class _PendingInPlace(_Pending):
    def wait(self) -> Tensor:
        return self.like.copy_(super().wait())


class MpiCommunicator:
    """Non-blocking MPI collectives.

    Args:
        comm: an mpi4py intracommunicator; it is duplicated, so the caller's own traffic is apart.
        timeout_seconds: how long a collective may take before `CommError`.
    """

    def __init__(self, comm: Any = None, *, timeout_seconds: float = 600.0) -> None:
        self.mpi = import_mpi()
        if timeout_seconds <= 0:
            raise ConfigError(f"timeout_seconds is {timeout_seconds}: give a positive number")
        self.comm = (comm or self.mpi.COMM_WORLD).Dup()
        self.timeout_seconds = timeout_seconds
        self.device, self.host = torch.device("cpu"), self.mpi.Get_processor_name()
        self.rank: int = self.comm.Get_rank()
        self.world_size: int = self.comm.Get_size()

    def _pending(
        self, request: Any, kept: tuple[Any, ...], result: Tensor, like: Tensor
    ) -> _Pending:
        return _Pending(request, kept, result, like, self.timeout_seconds)

    def all_gather(self, message: Tensor) -> Handle:
        sent = message.cpu()
        result = sent.new_empty(self.world_size, sent.numel())
        buffers = (_host(sent), _host(result))
        request = self.comm.Iallgather(*buffers)
        return self._pending(request, (sent, *buffers), result, message)

    def all_reduce(self, tensor: Tensor) -> Handle:
        sent = tensor.to("cpu", _SUMMED_AS.get(tensor.dtype, tensor.dtype), copy=True).view(-1)
        result = torch.empty_like(sent)
        request = self.comm.Iallreduce(sent.numpy(), result.numpy())
        shaped = result.view(tensor.shape)
        return _PendingInPlace(request, (sent, result), shaped, tensor, self.timeout_seconds)

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        sent = tensor.to("cpu", _SUMMED_AS.get(tensor.dtype, tensor.dtype))
        result = torch.empty_like(sent[0])
        request = self.comm.Ireduce_scatter_block(sent.numpy(), result.numpy())
        return self._pending(request, (sent, result), result, tensor)

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        sent = [m.numel() for m in messages]
        sizes, theirs = torch.tensor([sent, [0] * len(sent)], dtype=torch.int32)
        asked = self.comm.Ialltoall(sizes.numpy(), theirs.numpy())
        received = self._pending(asked, (sizes,), theirs, sizes).wait().tolist()
        packed = torch.cat(list(messages)).cpu()
        result = packed.new_empty(sum(received))
        request = self.comm.Ialltoallv((packed.numpy(), sent), (result.numpy(), received))
        whole = self._pending(request, (packed, result), result, messages[0]).wait()
        return list(torch.split(whole, received))

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        staged = tensor.detach().to("cpu", copy=True).contiguous()
        buffer = _host(staged)
        request = self.comm.Ibcast(buffer, root)
        tensor.copy_(self._pending(request, (staged, buffer), staged, tensor).wait())

    def barrier(self) -> None:
        nothing = torch.empty(0)
        self._pending(self.comm.Ibarrier(), (), nothing, nothing).wait()

    def split(self, color: int) -> Communicator:
        part = self.comm.Split(color, self.rank)
        try:
            return MpiCommunicator(part, timeout_seconds=self.timeout_seconds)
        finally:
            part.Free()

    def close(self) -> None:
        self.comm.Free()
