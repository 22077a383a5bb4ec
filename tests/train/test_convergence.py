"""Compressed training comes near dense training, and a broken memory is noticed.

Four workers, 300 steps, 2 % of the gradient: six values sent for each parameter. Arms are paired:
same weights, same data.
"""

import pytest

from benchmarks.convergence import train
from benchmarks.convergence_tasks import Teacher
from dgc.config import Compression, Dense

SEEDS = range(3)
SCHEDULE = {"density": 0.02, "warmup_steps": 30}


def accuracies(compression: Compression) -> list[float]:
    setting = {"workers": 4, "batch": 16, "epochs": 1, "lr": 0.1}
    return [train(Teacher(), compression, seed=seed, **setting).curve[-1] for seed in SEEDS]


@pytest.fixture(scope="module")
def dense() -> list[float]:
    return accuracies(Dense())
