"""`Communicator` over Horovod's own communication, whichever of MPI, Gloo and NCCL it runs on."""

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dgc.comm.base import Communicator, Handle, SelfCommunicator, poll
from dgc.errors import CommError, ConfigError, MissingPackageError

# Horovod has no bf16; 16-bit floats are summed as fp32, as over MPI.
_SUMMED_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
# Names recur, so that Horovod's cache of negotiated collectives serves all steps but the first.
_NAMES_OF_A_KIND = 16


def import_horovod() -> Any:
    """The module horovod.torch.

    Raises:
        MissingPackageError: it is not installed, or not for this torch.
    """
    try:
        import horovod.torch as hvd

        hvd.init  # noqa: B018  # absent where the package could not load its library
    except (ImportError, AttributeError) as error:
        raise MissingPackageError(
            f"horovod.torch cannot be imported ({error}): launch/install_horovod.sh builds it for "
            "the torch and MPI that are installed"
        ) from error
    return hvd


def open_horovod(timeout_seconds: float = 600.0) -> "HorovodCommunicator":
    """All of Horovod's ranks; Horovod is initialised first if the program has not done so."""
    hvd = import_horovod()
    if not hvd.is_initialized():
        try:
            hvd.init(process_sets="dynamic")  # `split` needs to add some later
        except RuntimeError as error:
            raise CommError(f"Horovod could not start: {error}") from error
    return HorovodCommunicator(timeout_seconds=timeout_seconds)


class _Pending:
    """Polls with a deadline: Horovod itself waits for ever for a rank that is stuck."""

    def __init__(self, comm: "HorovodCommunicator", handle: int, finish: Callable[[Any], Tensor]):
        self.comm, self.handle, self.finish = comm, handle, finish
        self.result: Tensor | None = None

    def wait(self) -> Tensor:
        if self.result is None:
            self.result = self.finish(self.comm.wait_for(self.handle))
        return self.result


class HorovodCommunicator:
    """Collectives of a Horovod process set.

    Args:
        process_set: a `horovod.torch.ProcessSet` that has this rank; None is all ranks.
        timeout_seconds: how long a collective may take before `CommError`.
    """

    # Communicators of a process set so far: each has names of its own.
    _opened: ClassVar[Counter[int]] = Counter()

    def __init__(self, process_set: Any = None, *, timeout_seconds: float = 600.0) -> None:
        self.hvd = import_horovod()
        if timeout_seconds <= 0:
            raise ConfigError(f"timeout_seconds is {timeout_seconds}: give a positive number")
        self.set = process_set or self.hvd.global_process_set
        self.timeout_seconds = timeout_seconds
        self.device, self.host = torch.device("cpu"), socket.gethostname()
        self.rank: int = self.set.rank()
        self.world_size: int = self.set.size()
        set_id = self.set.process_set_id
        self._label = f"dgc.{set_id}.{self._opened[set_id]}"
        self._opened[set_id] += 1
        self._started: Counter[str] = Counter()
        self._under_way: dict[str, _Pending] = {}
        self._added: dict[tuple[int, ...], Any] = {}

    def wait_for(self, handle: int) -> Any:
        """The result of one of Horovod's handles.

        Raises:
            CommError: the collective failed, or took too long.
        """
        poll(lambda: self.hvd.poll(handle), self.timeout_seconds)
        return _checked(lambda: self.hvd.synchronize(handle))

    def _start(
        self, kind: str, tensor: Tensor, finish: Callable[[Any], Tensor], **options: Any
    ) -> Handle:
        """Ranks tell collectives apart by name: the same calls in order give the same names."""
        shape = list(tensor.shape) if kind != "alltoall_async" else "any"  # it differs by rank
        family = f"{kind}.{tensor.dtype}.{shape}"
        name = f"{self._label}.{family}.{self._started[family] % _NAMES_OF_A_KIND}"
        self._started[family] += 1
        if name in self._under_way:
            self._under_way.pop(name).wait()
        start = getattr(self.hvd, kind)
        handle = _checked(lambda: start(tensor, name=name, process_set=self.set, **options))

        def finished(result: Any) -> Tensor:
            self._under_way.pop(name, None)
            return finish(result)

        self._under_way[name] = pending = _Pending(self, handle, finished)
        return pending

    def all_gather(self, message: Tensor) -> Handle:
        size, dtype = self.world_size, message.dtype
        sent = message.detach().view(-1).view(torch.uint8)
        return self._start("allgather_async", sent, lambda got: got.view(dtype).view(size, -1))

    def all_reduce(self, tensor: Tensor) -> Handle:
        sent = tensor.detach().to(_SUMMED_AS.get(tensor.dtype, tensor.dtype)).view(-1)

        def finish(summed: Tensor) -> Tensor:
            if summed.dtype != tensor.dtype:
                tensor.detach().view(-1).copy_(summed)
            return tensor

        return self._start("allreduce_async_", sent, finish, op=self.hvd.Sum)

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        sent = tensor.detach().to(_SUMMED_AS.get(tensor.dtype, tensor.dtype))

        def finish(row: Tensor) -> Tensor:
            return row.view(tensor.shape[1:]).to(tensor.dtype)

        return self._start("reducescatter_async", sent, finish, op=self.hvd.Sum)

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        sizes = torch.tensor([m.numel() for m in messages], dtype=torch.int32)
        received: list[int] = []

        def finish(result: tuple[Tensor, Tensor]) -> Tensor:
            received.extend(result[1].tolist())
            return result[0]

        packed = torch.cat(list(messages))
        whole = self._start("alltoall_async", packed, finish, splits=sizes).wait()
        return list(torch.split(whole, received))

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        whole = tensor.detach().contiguous()
        sent = whole.view(-1).view(torch.uint8)
        source = self.set.ranks[root]
        for part in sent.split(1 << 30):  # Horovod counts to 2^31
            self._start("broadcast_async_", part, lambda got: got, root_rank=source).wait()
        if whole.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(whole)

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1)).wait()

    def split(self, color: int) -> Communicator:
        """As `Communicator.split`; of all of Horovod's ranks only.

        Raises:
            ConfigError: this is a part already, or the program called hvd.init() without
                process_sets="dynamic".
        """
        if self.set.process_set_id != 0:
            raise ConfigError("Horovod cannot split a part of the ranks again: split all of them")
        colors = self.all_gather(torch.tensor([color])).wait().view(-1).tolist()
        mine: Communicator = SelfCommunicator()
        for each in sorted(set(colors)):  # every rank must take part in making every set
            ranks = tuple(r for r, c in enumerate(colors) if c == each)
            part = self._process_set(ranks) if len(ranks) > 1 else None
            if each == color and part is not None:
                mine = HorovodCommunicator(part, timeout_seconds=self.timeout_seconds)
        return mine

    def duplicate(self) -> Communicator:
        twin = HorovodCommunicator(self.set, timeout_seconds=self.timeout_seconds)
        twin._added = self._added  # Horovod refuses a process set of the same ranks twice
        return twin

    def _process_set(self, ranks: tuple[int, ...]) -> Any:
        if len(ranks) == self.world_size:
            return self.set
        if ranks not in self._added:
            try:
                self._added[ranks] = self.hvd.add_process_set(list(ranks))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"Horovod could not add the process set {list(ranks)}: {error}\nLet dgc.init "
                    'initialise Horovod, or call hvd.init(process_sets="dynamic"), and leave this '
                    "set to dgc"
                ) from error
        return self._added[ranks]

    def close(self) -> None:
        """Remove the process sets that were added; Horovod ends with the process, by itself."""
        while self._added:
            _, part = self._added.popitem()
            _checked(lambda part=part: self.hvd.remove_process_set(part))  # type: ignore[misc]


def _checked(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"a Horovod collective failed: {error}\nAnother rank has probably died; see its own "
            "output first, then restart all ranks from the last checkpoint"
        ) from error
