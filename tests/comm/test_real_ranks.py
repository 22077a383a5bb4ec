"""The communicators and training in real processes."""

import subprocess
import sys

import pytest

from tests.launching import ROOT, environment, mpirun, torchrun

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
        (torchrun, "gloo", "is killed"),
        (mpirun, "mpi", "dies"),
        (mpirun, "mpi", "hangs"),
        (mpirun, "mpi", "is killed"),
    ],
)
def test_a_dead_rank_stops_the_others(launch, backend, how) -> None:  # type: ignore[no-untyped-def]
    done = launch(2, "tests/ranks/dying.py", backend, how, timeout=60)
    assert done.returncode != 0
    # mpirun kills the others itself when a rank exits; a rank that hangs is ours to find.
    if backend == "gloo" or how == "hangs":
        assert "rank 0 stopped after" in done.stdout, done.stdout + done.stderr


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
