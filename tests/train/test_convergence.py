"""Compressed training comes near dense training, and a broken memory is noticed.

Four workers, 300 steps, 2 % of the gradient: six values sent for each parameter. Both arms at their
best learning rate of 0.05, 0.1, 0.2, 0.4; they start from the same weights and see the same data.
"""

from statistics import mean

from benchmarks.convergence import train
from benchmarks.convergence_tasks import Teacher
from dgc.config import DGC, Compression, Dense


def accuracy(compression: Compression, lr: float) -> float:
    """Mean over three seeds; the standard deviation of one is 0.4 points."""
    setting = {"workers": 4, "batch": 16, "epochs": 1, "lr": lr}
    return mean(train(Teacher(), compression, seed=s, **setting).curve[-1] for s in range(3))


def test_it_is_as_accurate_as_dense_training() -> None:
    sparse = DGC(density=0.02, warmup_steps=30)
    assert accuracy(sparse, lr=0.4) > accuracy(Dense(), lr=0.2) - 0.7  # three deviations of a mean


def test_without_a_memory_it_is_not() -> None:
    forgetful = DGC(density=0.02, warmup_steps=30, local_accumulation=False)
    assert accuracy(forgetful, lr=0.4) < accuracy(Dense(), lr=0.2) - 3
