"""`Communicator` over mpi4py.

MPI reads and writes GPU memory where it says it can; else CUDA tensors are staged in pinned memory.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.comm.base import Communicator, Handle, poll
from dgc.errors import ConfigError, MissingPackageError

# 16-bit floats have no MPI sum: they travel as fp32.
_SUMMED_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def import_mpi() -> Any:
    """mpi4py's MPI module; importing it initialises MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter without a library of MPI
        raise MissingPackageError(
            f"mpi4py cannot be imported ({error}): pip install 'dgc[mpi]', which brings Open MPI too"
        ) from error
    return MPI


def is_cuda_aware(library: str) -> bool:
    """Whether MPI says that it can be given CUDA tensors.

    Args:
        library: a shared library that is linked with MPI, as `mpi4py.MPI.__file__`.
    """
    query = getattr(ctypes.CDLL(library), "MPIX_Query_cuda_support", None)  # Open MPI, MPICH
    return query is not None and query() == 1


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, shared: MPI and DLPack do not know every dtype."""
    return tensor.view(-1).view(torch.uint8)


class _Pending:
    """Polls with a deadline, so that a rank that died without a word cannot hang the others."""

    def __init__(
        self, request: Any, kept: tuple[Any, ...], result: Tensor, like: Tensor, timeout: float
    ) -> None:
        self.request, self.kept = request, kept
        self.result, self.like, self.timeout = result, like, timeout

    def wait(self) -> Tensor:
        poll(self.request.Test, self.timeout)
        self.kept = ()
        return self.result.to(self.like.device, self.like.dtype, non_blocking=True)


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
        if comm == self.mpi.COMM_NULL:
            raise ConfigError(
                "comm is COMM_NULL: this rank has no part in it, let it go its own way"
            )
        # Gradients of a GPU are complete on a thread of autograd's, which is not the one of MPI_Init.
        if torch.cuda.is_available() and self.mpi.Query_thread() < self.mpi.THREAD_SERIALIZED:
            raise ConfigError(
                "MPI was started for calls of the main thread alone, but gradients of a GPU are sent "
                "by another: start it with MPI_THREAD_SERIALIZED or more, as mpi4py does by itself "
                "(mpi4py.rc.thread_level)"
            )
        self.comm, made = (self.mpi.COMM_WORLD if comm is None else comm).Idup()
        poll(made.Test, timeout_seconds)
        self.timeout_seconds = timeout_seconds
        self.device, self.host = torch.device("cpu"), self.mpi.Get_processor_name()
        self.cuda_aware = is_cuda_aware(self.mpi.__file__)
        self.rank: int = self.comm.Get_rank()
        self.world_size: int = self.comm.Get_size()

    def _pending(
        self, request: Any, kept: tuple[Any, ...], result: Tensor, like: Tensor
    ) -> _Pending:
        return _Pending(request, kept, result, like, self.timeout_seconds)

    def _staged(self, tensor: Tensor, *, copy: bool = False) -> Tensor:
        """`tensor` where MPI can read it and in a dtype that it can sum; a copy on request."""
        dtype = _SUMMED_AS.get(tensor.dtype, tensor.dtype)
        if tensor.device.type != "cuda":
            return tensor.detach().to(dtype, copy=copy)
        if self.cuda_aware:
            sent = tensor.detach().to(dtype, copy=copy)
            torch.cuda.current_stream(tensor.device).synchronize()  # MPI knows of no streams
            return sent
        return torch.empty(tensor.shape, dtype=dtype, pin_memory=True).copy_(tensor.detach())

    def _room(self, sent: Tensor, shape: Sequence[int]) -> Tensor:
        """Memory of the kind that `sent` has, for MPI to write to."""
        pinned = sent.device.type == "cpu" and sent.is_pinned()
        return torch.empty(tuple(shape), dtype=sent.dtype, device=sent.device, pin_memory=pinned)

    def all_gather(self, message: Tensor) -> Handle:
        sent = self._staged(_bytes(message.detach())).view(message.dtype)
        result = self._room(sent, (self.world_size, sent.numel()))
        request = self.comm.Iallgather(_bytes(sent), _bytes(result))
        return self._pending(request, (sent,), result, message)

    def all_reduce(self, tensor: Tensor) -> Handle:
        sent = self._staged(tensor, copy=True)
        result = self._room(sent, sent.shape)
        request = self.comm.Iallreduce(sent, result)
        return _PendingInPlace(request, (sent,), result, tensor, self.timeout_seconds)

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        sent = self._staged(tensor)
        result = self._room(sent, sent.shape[1:])
        request = self.comm.Ireduce_scatter_block(sent, result)
        return self._pending(request, (sent,), result, tensor)

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        sent = [m.numel() for m in messages]
        sizes, theirs = torch.tensor([sent, [0] * len(sent)], dtype=torch.int32)
        asked = self.comm.Ialltoall(sizes, theirs)
        received = self._pending(asked, (sizes,), theirs, sizes).wait().tolist()
        packed = self._staged(torch.cat(list(messages)))
        result = self._room(packed, (sum(received),))
        request = self.comm.Ialltoallv((packed, sent), (result, received))
        whole = self._pending(request, (packed,), result, messages[0]).wait()
        return list(torch.split(whole, received))

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        staged = self._staged(_bytes(tensor.detach().contiguous()), copy=True)
        for part in staged.split(1 << 30):  # MPI counts to 2^31
            self._pending(self.comm.Ibcast(part, root), (), part, part).wait()
        tensor.copy_(staged.view(tensor.dtype).view(tensor.shape), non_blocking=True)

    def barrier(self) -> None:
        nothing = torch.empty(0)
        self._pending(self.comm.Ibarrier(), (), nothing, nothing).wait()

    def split(self, color: int) -> Communicator:
        self.barrier()  # Split has no time limit
        part = self.comm.Split(color, self.rank)
        try:
            return MpiCommunicator(part, timeout_seconds=self.timeout_seconds)
        finally:
            part.Free()

    def duplicate(self) -> Communicator:
        return MpiCommunicator(self.comm, timeout_seconds=self.timeout_seconds)

    def close(self) -> None:
        if self.comm != self.mpi.COMM_NULL:
            self.comm.Free()
