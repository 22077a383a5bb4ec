"""The communicators and training in real processes."""

import ctypes.util
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch

import dgc
from dgc.comm.mpi import is_cuda_aware
from dgc.comm.torch_dist import TorchCommunicator
from dgc.errors import CommError
from tests.launching import ROOT, environment, mpirun, torchrun
from tests.processes import run_processes

LAUNCHES = [
    (torchrun, 2, "gloo"),
    (torchrun, 4, "gloo"),
    (mpirun, 2, "auto"),
    (mpirun, 4, "mpi"),
    (mpirun, 2, "gloo"),
]
IDS = [f"{launch.__name__}-{ranks}-{backend}" for launch, ranks, backend in LAUNCHES]


@pytest.mark.parametrize(("launch", "ranks", "backend"), LAUNCHES, ids=IDS)
def test_collectives(launch, ranks, backend) -> None:  # type: ignore[no-untyped-def]
    done = launch(ranks, "tests/ranks/collectives.py", backend)
    assert done.returncode == 0, done.stderr
    assert "collectives agree" in done.stdout


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_one_inf_on_one_rank_skips_one_step(device: str) -> None:
    done = mpirun(2, "tests/ranks/one_inf.py", device)
    assert done.returncode == 0, done.stderr
    assert "one step was skipped" in done.stdout


def test_an_mpi_program_trains_in_parts_of_its_ranks() -> None:
    done = mpirun(4, "tests/ranks/mpi_program.py")
    assert done.returncode == 0, done.stderr
    assert "an MPI program as before" in done.stdout


@needs_gpu
def test_collectives_of_gpu_tensors_over_mpi() -> None:
    done = mpirun(2, "tests/ranks/collectives.py", "mpi", "cuda")
    assert done.returncode == 0, done.stderr
    assert "collectives agree" in done.stdout


def test_a_library_that_does_not_know_takes_no_gpu_tensors() -> None:
    library = ctypes.util.find_library("c")
    assert library is not None
    assert not is_cuda_aware(library)


@pytest.mark.parametrize(("launch", "ranks", "backend"), LAUNCHES[:4], ids=IDS[:4])
def test_training_is_bit_identical_and_resumes(launch, ranks, backend) -> None:  # type: ignore[no-untyped-def]
    done = launch(ranks, "tests/ranks/training.py", backend)
    assert done.returncode == 0, done.stderr
    assert "training agrees" in done.stdout


@pytest.mark.parametrize(
    ("launch", "backend", "how"),
    [
        (torchrun, "gloo", "dies"),
        (torchrun, "gloo", "hangs"),
        (torchrun, "gloo", "hangs early"),
        (torchrun, "gloo", "is killed"),
        (mpirun, "mpi", "dies"),
        (mpirun, "mpi", "raises"),
        (mpirun, "mpi", "exits"),
        (mpirun, "mpi", "hangs"),
        (mpirun, "mpi", "hangs early"),
        (mpirun, "mpi", "is killed"),
    ],
)
def test_a_dead_rank_stops_the_others(launch, backend, how) -> None:  # type: ignore[no-untyped-def]
    done = launch(2, "tests/ranks/dying.py", backend, how, timeout=60)
    assert done.returncode != 0
    # mpirun kills the others itself when a rank exits; a rank that hangs is ours to find.
    if backend == "gloo" or how.startswith("hangs"):
        assert "rank 0 stopped in time" in done.stdout, done.stdout + done.stderr
    assert how != "raises" or "ValueError: a fault of the script" in done.stderr


@pytest.mark.parametrize("ranks", [16, 32])
def test_many_ranks_agree_with_every_pattern(ranks: int) -> None:
    done = subprocess.run(
        [sys.executable, "tests/ranks/many.py", str(ranks)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert f"{ranks} ranks agree" in done.stdout


@pytest.mark.parametrize(
    ("launch", "backend", "opened_by"),
    [(torchrun, "gloo", "dgc"), (torchrun, "gloo", "script"), (mpirun, "mpi", "dgc")],
)
def test_optimizers_do_not_take_each_others_messages(launch, backend, opened_by) -> None:  # type: ignore[no-untyped-def]
    done = launch(2, "tests/ranks/twins.py", backend, opened_by)
    assert done.returncode == 0, done.stderr
    assert "each has its own mean" in done.stdout


def slow_rank() -> str:
    """What rank 0 finds when rank 1 comes late, in a group that the script has opened."""
    with dgc.init(timeout_seconds=0.5) as rt:
        assert rt.comm.split(0).timeout == timedelta(seconds=0.5)
        whole = TorchCommunicator()
        assert whole.split(0).timeout == whole.timeout == timedelta(seconds=60)
        if rt.rank == 1:
            time.sleep(3)
            return ""
        with pytest.raises(CommError) as found:
            rt.comm.barrier()
        return str(found.value)


def test_the_time_limit_holds_in_a_group_of_the_script() -> None:
    assert run_processes(2, {"slow": slow_rank})["slow"][0].lower().count("timed out") == 1
