"""Every implementation gives the reference's bits; the reference is held to slow float64 loops."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dgc.core import kernels
from dgc.core.kernels import cpu, reference
from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch

NUMELS = (1, 3, 1024, 1025, 70_001, 64, 300_000, 2)
LAYOUT = Layout.of(NUMELS)
COUNTS = tuple(max(1, n // 100) for n in NUMELS)
ROWS = torch.tensor([[0.9, 0.37, 0.1, 0.0], [0.8, 1.0, 1.0, 1.0]]).repeat(4, 1)


def gaussian(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYOUT.offsets[-1], generator=generator) * scale


def same_batch(a: SparseBatch, b: SparseBatch) -> None:
    assert a.counts == b.counts
    assert a.numels == b.numels
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.values.view(torch.int32), b.values.view(torch.int32))


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def edge_tensors() -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Flat tensors of `LAYOUT` and how many are wanted of each."""
    n = LAYOUT.offsets[-1]
    ties = torch.arange(n).remainder(7).float() * torch.tensor([1.0, -1.0]).repeat(n // 2 + 1)[:n]
    few = torch.zeros(n)
    few[:: n // 100] = 1.0
    wide = gaussian(1) * torch.logspace(-30, 30, n)[torch.randperm(n)]
    return {
        "gaussian": (gaussian(1), COUNTS),
        "everything": (gaussian(1), NUMELS),
        "nothing": (gaussian(1), (0,) * len(NUMELS)),
        "zeros": (torch.zeros(n), COUNTS),
        "equal": (torch.full((n,), -2.5), COUNTS),
        "ties": (ties, COUNTS),
        "few": (few, COUNTS),
        "denormal": (gaussian(1, 1e-41), COUNTS),
        "huge": (gaussian(1, 1e38).clamp(-3e38, 3e38), COUNTS),
        "wide": (wide, COUNTS),
    }


@pytest.mark.parametrize("name", edge_tensors())
def test_selection_equals_the_reference(name: str, threads: int) -> None:
    v, counts = edge_tensors()[name]
    expected = reference.select_(v, LAYOUT, counts, None)
    same_batch(cpu.select_(v, LAYOUT, counts, None), expected)
    thresholds = torch.zeros(len(NUMELS))
    for _ in range(3):  # unknown thresholds, then remembered ones
        same_batch(cpu.select_(v, LAYOUT, counts, thresholds), expected)


@pytest.mark.parametrize("guess", [1e-45, 1e-20, 0.5, 3.0, 1e30])
def test_a_wrong_threshold_changes_nothing(guess: float) -> None:
    v = gaussian(2)
    thresholds = torch.full((len(NUMELS),), guess)
    expected = reference.select_(v, LAYOUT, COUNTS, None)
    same_batch(cpu.select_(v, LAYOUT, COUNTS, thresholds), expected)


def test_reference_selects_by_magnitude_and_first_of_equals() -> None:
    v = edge_tensors()["ties"][0]
    batch = reference.select_(v, LAYOUT, COUNTS, None)
    for sparse, dense, k in zip(batch.split(), LAYOUT.split(v), COUNTS, strict=True):
        ranked = sorted(range(dense.numel()), key=lambda i: (-abs(dense[i].item()), i))
        nonzero = [i for i in ranked[:k] if dense[i] != 0]
        assert sparse.indices.tolist() == sorted(nonzero)
        assert torch.equal(sparse.values, dense[sparse.indices])
        if dense.numel() > 2000:
            break
