"""Rank and sizes from each launcher's environment."""

from unittest.mock import patch

import pytest
import torch

from dgc.comm.runtime import Place, _choose, _device, default_communicator, find_place, init
from dgc.errors import ConfigError

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x1),2(x2)",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place(0, 1, 0, 1, "none")),
        (OPEN_MPI, Place(3, 8, 1, 2, "Open MPI")),
        (MPICH, Place(1, 4, 1, 4, "MPICH")),
        ({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"}, Place(5, 8, 1, 2, "srun")),
        ({**SLURM, **MPICH}, Place(1, 4, 1, 4, "MPICH")),
        (MVAPICH, Place(1, 2, 1, 2, "MVAPICH2")),
        (TORCHRUN, Place(2, 4, 0, 2, "torchrun")),
        (SLURM, Place(5, 8, 1, 2, "srun")),
        ({**SLURM, **OPEN_MPI}, Place(3, 8, 1, 2, "Open MPI")),
        ({**SLURM, **OPEN_MPI, **TORCHRUN}, Place(2, 4, 0, 2, "torchrun")),
    ],
)
def test_find_place(env: dict[str, str], place: Place) -> None:
    assert find_place(env) == place


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 does not fit WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 does not fit"),
    ],
)
def test_bad_environments(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_place(env)


def test_a_second_init_that_ends_leaves_the_first_open() -> None:
    with init() as outer:
        with init() as inner:
            assert default_communicator() is inner.comm
        assert default_communicator() is outer.comm
    assert default_communicator() is not outer.comm


def test_the_gpu_that_a_script_has_chosen_is_kept() -> None:
    """Under torch.multiprocessing.spawn no launcher says which of a host's ranks this is."""
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.device_count", return_value=4),
        patch("torch.cuda.current_device", return_value=2),
        patch("torch.cuda.set_device") as chosen,
        patch("torch.distributed.is_initialized", return_value=True),
    ):
        device = _device(Place(0, 1, 0, 1, "none"))
    assert device == torch.device("cuda", 2)
    chosen.assert_not_called()


@pytest.mark.parametrize(
    ("gpus", "variables", "device", "backend"),
    [
        (4, {}, 3, "nccl"),
        (2, {}, 1, "gloo"),
        (1, {}, 0, "gloo"),
        (1, {"SLURM_GPUS_PER_TASK": "1"}, 0, "nccl"),
    ],
)
def test_the_gpu_of_the_last_of_four_ranks(
    gpus: int, variables: dict[str, str], device: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs are shared where there are fewer than ranks; a rank that sees its own alone has nccl."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = Place(3, 4, 3, 4, "srun")
    chosen = []
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.device_count", return_value=gpus),
        patch("torch.cuda.set_device", chosen.append),
        patch("torch.cuda.current_device", lambda: chosen[-1]),
    ):
        assert _device(place) == torch.device("cuda", device)
        assert _choose(place, torch.device("cuda", device)) == backend
