"""Levels and codes against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgc.core import codebook
from dgc.core.entropy import count_symbols, entropy_bits
from dgc.core.kmeans import optimal_means

VALUES = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=9)


def error(values: Tensor, levels: Tensor) -> float:
    return float((values.double()[:, None] - levels[None]).square().min(1).values.sum())


@given(VALUES, st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_kmeans_is_optimal(values: list[float], k: int) -> None:
    tensor = torch.tensor(values)
    ordered = sorted(float(v) for v in tensor)
    best = float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(ordered) + 1), k - 1):
        edges = [0, *cuts, len(ordered)]
        parts = [ordered[a:b] for a, b in itertools.pairwise(edges)]
        best = min(best, sum(sum((v - sum(p) / len(p)) ** 2 for v in p) for p in parts if p))
    levels = codebook.kmeans_levels(tensor, k)
    assert levels.numel() <= k
    assert error(tensor, levels) == pytest.approx(best, abs=1e-4)


def test_kmeans_of_many_values_is_close_to_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    exact = error(values, codebook.kmeans_levels(values, 15))
    monkeypatch.setattr(codebook, "EXACT_WORK", 1 << 16)
    assert error(values, codebook.kmeans_levels(values, 15)) <= 1.001 * exact


def test_outliers_count_in_full_among_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    values[:10] += 20
    values[10:20] -= 30
    exact = error(values, codebook.kmeans_levels(values, 15))
    for name, size in {"EXACT_WORK": 0, "COARSE_RUNS": 1 << 8, "FINE_RUNS": 1 << 12}.items():
        monkeypatch.setattr(codebook, name, size)
    assert error(values, codebook.kmeans_levels(values, 15)) <= 1.01 * exact


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 4)), min_size=4, max_size=12))
@settings(deadline=None)
def test_a_value_with_a_count_is_as_many_values(pairs: list[tuple[float, int]]) -> None:
    values = torch.tensor([v for v, _ in sorted(pairs)], dtype=torch.float64)
    counts = torch.tensor([float(c) for _, c in sorted(pairs)], dtype=torch.float64)
    repeated = values.repeat_interleave(counts.long())
    levels = torch.from_numpy(optimal_means(values.numpy(), counts.numpy(), 4))
    assert error(repeated, levels) == pytest.approx(
        error(repeated, codebook.kmeans_levels(repeated, 4)), abs=1e-9
    )
    moved = codebook.lloyd(values, torch.tensor([-5.0, 5.0]), counts)
    assert torch.allclose(moved, codebook.lloyd(repeated, torch.tensor([-5.0, 5.0])))


@pytest.mark.parametrize("start", [codebook.linear_levels, codebook.density_levels])
def test_lloyd_improves_on_its_start(start: object) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    levels = start(values, 8)  # type: ignore[operator]
    improved = codebook.lloyd(values, levels)
    assert error(values, improved) < 0.9 * error(values, levels)
    assert error(values, improved) >= error(values, codebook.kmeans_levels(values, 8)) - 1e-6


@given(
    VALUES,
    st.lists(st.tuples(st.floats(-9, 9, width=32), st.floats(0, 12)), min_size=1, max_size=6),
    st.floats(0, 5),
)
@settings(deadline=None)
def test_penalised_codes_are_the_cheapest(
    values: list[float], book: list[tuple[float, float]], price: float
) -> None:
    levels = torch.tensor([level for level, _ in book]).double()
    bits = torch.tensor([bit for _, bit in book]).double()
    codes = codebook.penalised(torch.tensor(values), levels, bits, price)
    for value, code in zip(torch.tensor(values).double(), codes.tolist(), strict=True):
        costs = (value - levels).square() + price * bits
        assert float(costs[code]) == pytest.approx(float(costs.min()), rel=1e-6, abs=1e-6)


def test_a_higher_penalty_buys_fewer_bits_for_more_error() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    start = codebook.kmeans_levels(values, 31)
    bits, errors = [], []
    for penalty in (0.0, 0.001, 0.01, 0.05):
        levels, codes = codebook.entropy_codes(values, start, 20_000, penalty)
        decoded = torch.cat([levels.new_zeros(1), levels])[codes.int()]
        counts = count_symbols(codes, levels.numel() + 1)
        bits.append(entropy_bits([counts[0] + 20_000, *counts[1:]]))
        errors.append(float((decoded - values).square().sum()))
    assert bits == sorted(bits, reverse=True)
    assert errors == sorted(errors)
    assert bits[3] < 0.75 * bits[0]


def test_penalised_search_ends_where_neither_step_helps() -> None:
    """At the end, codes are the cheapest at the final frequencies and levels are means."""
    values = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    start = codebook.kmeans_levels(values, 7)
    levels, codes = codebook.entropy_codes(values, start, 9000, 0.01, iterations=500)
    for code in range(1, levels.numel() + 1):
        assert float(levels[code - 1]) == pytest.approx(
            float(values[codes == code].mean()), abs=1e-6
        )
    counts = torch.tensor(count_symbols(codes, levels.numel() + 1)).double()
    counts[0] += 9000
    bits = counts.sum().log2() - counts.log2()
    price = 0.01 * float(values.double().square().mean())
    full = torch.cat([levels.new_zeros(1), levels])
    assert torch.equal(codebook.penalised(values, full, bits, price), codes)


@pytest.mark.parametrize("levels", [[0.3, 0.1 + 0.2, 1.0], [-1.7e308, 0.0, 1e308, 1.7e308]])
def test_places_tell_neighbours_and_the_largest_apart(levels: list[float]) -> None:
    table = torch.tensor(levels, dtype=torch.float64)
    for dtype in (torch.float64, torch.bfloat16):
        own = table.to(dtype).unique()
        values = own[torch.arange(40) % own.numel()].view(5, 8)
        assert torch.equal(codebook.lookup(codebook.places(values, own), own), values)


def test_kmeans_keeps_few_values_of_64_bits() -> None:
    values = torch.tensor([0.3, 0.1 + 0.2, 1e300], dtype=torch.float64)
    assert torch.equal(codebook.kmeans_levels(values.repeat(3), 3), values)
