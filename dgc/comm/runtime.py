"""Who am I: rank and size from the launcher's environment, and a communicator to match."""

import hashlib
import os
import re
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dgc.comm.base import Communicator, SelfCommunicator
from dgc.comm.horovod import open_horovod
from dgc.comm.mpi import MpiCommunicator, import_mpi
from dgc.comm.torch_dist import TorchCommunicator
from dgc.errors import CommError, ConfigError

BACKENDS = ("auto", "gloo", "nccl", "mpi", "horovod")


class Place(NamedTuple):
    """Where a process stands in its job, and which launcher said so."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    launcher: str


# Per launcher: rank, world size, local rank, local size. An explicit RANK comes first, as whoever
# sets it means it; Slurm last, as mpirun and torchrun are often started inside a Slurm job.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MVAPICH2": (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
_MPI_LAUNCHERS = ("Open MPI", "MVAPICH2", "MPICH")


def find_place(env: Mapping[str, str]) -> Place:
    """Read rank and sizes from a launcher's environment; a plain process is rank 0 of 1.

    Example:
        >>> find_place({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
        Place(rank=1, world_size=4, local_rank=1, local_size=4, launcher='torchrun')

    Raises:
        ConfigError: if the variables are not numbers or do not fit together.
    """
    for launcher, (rank, size, local_rank, local_size) in _LAUNCHERS.items():
        if rank in env and size in env:
            if local_rank not in env and launcher == "MPICH" and _started_by_srun(env):
                continue  # Slurm's PMI speaks as MPICH's does, and not of hosts
            place = Place(
                _integer(env, rank, 0),
                _integer(env, size, 1),
                _integer(env, local_rank, 0),
                _integer(env, local_size, 0) or _integer(env, size, 1),
                launcher,
            )
            if not 0 <= place.rank < place.world_size:
                raise ConfigError(
                    f"{rank}={place.rank} does not fit {size}={place.world_size}: "
                    "start all ranks with one launcher"
                )
            return place
    return Place(0, 1, 0, 1, "none")


def _started_by_srun(env: Mapping[str, str]) -> bool:
    rank, size = _LAUNCHERS["MPICH"][:2]
    return (env[rank], env[size]) == (env.get("SLURM_PROCID"), env.get("SLURM_NTASKS"))


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    if name == "SLURM_STEP_TASKS_PER_NODE":  # such as "4(x2),3": 4, 4 and 3 tasks
        runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        tasks = [int(n) for n, times in runs for _ in range(int(times or 1))]
        return tasks[_integer(env, "SLURM_NODEID", 0)]
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: a whole number is needed") from None


@dataclass
class Runtime:
    """This process's place in the job. A context manager: leaving it closes the communication."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device
    comm: Communicator
    backend: str

    def __post_init__(self) -> None:
        _open.append(self.comm)

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif self.backend == "mpi" and isinstance(error, SystemExit) and error.code:
            _abort(import_mpi())  # for this Python does not call the hook that does so

    def close(self) -> None:
        """Close the communication that `init` opened; what was open before stays open."""
        if self.comm in _open:
            _open.remove(self.comm)
        self.comm.close()


def init(backend: str = "auto", *, timeout_seconds: float = 600.0) -> Runtime:
    """Find rank and device, and open communication.

    Works under mpirun (Open MPI, MPICH, MVAPICH2), torchrun, srun, horovodrun, and as a plain
    process, which is a world of one that sends nothing. A torch.distributed process group that is
    already initialised is used, and left open by `close`.

    Args:
        backend: "auto" takes nccl where each rank has a GPU, else mpi if an MPI launcher started
            the job and mpi4py is installed, else gloo; or "gloo", "nccl", "mpi", "horovod".
        timeout_seconds: how long a collective may wait for another rank before `CommError`.

    Under MPI an uncaught exception on one rank aborts all ranks, which would otherwise wait for it;
    `sys.exit` with a code that is not 0 does so inside `with dgc.init():`.

    Raises:
        ConfigError: an unknown backend, or an environment that does not fit together.
        MissingPackageError: the backend's package is not installed.
        CommError: the ranks did not find one another.

    Example:
        >>> with init() as rt:
        ...     rt.rank, rt.world_size
        (0, 1)
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}: choose from {', '.join(BACKENDS)}")
    place = find_place(os.environ)
    device = _device(place)
    chosen = _choose(place, device) if backend == "auto" else backend
    comm: Communicator
    if dist.is_initialized() and chosen not in ("mpi", "horovod"):
        comm = TorchCommunicator(timeout_seconds=timeout_seconds)
    elif chosen == "none":
        comm = SelfCommunicator()
    elif chosen == "mpi":
        comm = _open_mpi(timeout_seconds)
    elif chosen == "horovod":
        comm = open_horovod(timeout_seconds)
    else:
        comm = _open_torch(chosen, place, timeout_seconds)
    through = {"mpi": "mpi4py", "horovod": "Horovod"}.get(chosen)
    if comm.world_size != place.world_size and through and place.launcher != "none":
        raise CommError(
            f"{place.launcher} started {place.world_size} ranks, {through} sees {comm.world_size}: "
            "it was built for another launcher. Use the mpirun (for Horovod also horovodrun) that "
            f"belongs to it, or reinstall {through}"
        )
    if comm.world_size > 1 and place.launcher == "none":
        place = place._replace(local_size=comm.world_size, local_rank=comm.rank)
    return Runtime(
        comm.rank, comm.world_size, place.local_rank, place.local_size, device, comm, chosen
    )


_open: list[Communicator] = []  # by `init`, and not closed; the last one counts
_of_torch: tuple[Any, TorchCommunicator] | None = None  # the default group, weakly, and its own


def default_communicator(device: torch.device | None = None) -> Communicator:
    """The communicator of the last `init`, else of torch.distributed, else a world of one.

    Args:
        device: see `TorchCommunicator`.

    Raises:
        ConfigError: a launcher started several ranks and none of these was opened.
    """
    global _of_torch
    if _open:
        return _open[-1]
    if dist.is_initialized():
        if _of_torch is None or _of_torch[0]() is not dist.group.WORLD:
            _of_torch = weakref.ref(dist.group.WORLD), TorchCommunicator(device=device)
        return _of_torch[1]
    place = find_place(os.environ)
    if place.world_size > 1:
        raise ConfigError(
            f"{place.launcher} started {place.world_size} ranks, but no communication is open: "
            "call dgc.init() first"
        )
    return SelfCommunicator()


def _device(place: Place) -> torch.device:
    if place.launcher == "none" and dist.is_initialized() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # that the script has chosen
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A rank may see its own GPU alone, as with Slurm's --gpus-per-task, or share those that there are.
    torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def _choose(place: Place, device: torch.device) -> str:
    if dist.is_initialized():
        return str(dist.get_backend())
    if place.world_size == 1:
        return "none"
    own = place.local_size <= torch.cuda.device_count() or (
        place.launcher == "srun" and "SLURM_GPUS_PER_TASK" in os.environ
    )
    if device.type == "cuda" and own:
        return "nccl"
    return "mpi" if place.launcher in _MPI_LAUNCHERS and find_spec("mpi4py") else "gloo"


def _open_mpi(timeout_seconds: float) -> MpiCommunicator:
    mpi = import_mpi()
    previous = sys.excepthook

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        _abort(mpi)

    sys.excepthook = abort
    return MpiCommunicator(timeout_seconds=timeout_seconds)


def _abort(mpi: Any) -> None:
    """End all ranks, which would wait for this one."""
    sys.stderr.flush()
    if mpi.COMM_WORLD.Get_size() > 1:
        mpi.COMM_WORLD.Abort(1)


def _open_torch(backend: str, place: Place, timeout_seconds: float) -> TorchCommunicator:
    address, port = _rendezvous(place)
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}",
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"rank {place.rank} of {place.world_size} did not reach the others over {backend} at "
            f"{address}:{port}: {error}\nSet MASTER_ADDR and MASTER_PORT to a free port of rank 0; if "
            "some ranks have no GPU, give all the same backend by name"
        ) from error
    return TorchCommunicator(owner=True)


def _rendezvous(place: Place) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT; on one host both have defaults that the ranks agree on."""
    env = os.environ
    if "MASTER_ADDR" not in env and place.local_size < place.world_size:
        raise ConfigError(
            f"{place.launcher} started {place.world_size} ranks, {place.local_size} on this host: "
            "set MASTER_ADDR to the address of rank 0's host, or use backend='mpi'"
        )
    job = next((env[n] for n in ("PMIX_NAMESPACE", "SLURM_JOB_ID") if n in env), "")
    job += env.get("SLURM_STEP_ID", "") if place.launcher == "srun" else ""
    # Different jobs on one host get different ports, all ranks of a job the same.
    default = 20000 + int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "little") % 10000
    return env.get("MASTER_ADDR", "127.0.0.1"), _integer(env, "MASTER_PORT", default)
