"""The gap code: tables in integers, its bound against the entropy and against any spread."""

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgc.core.kernels import codec_cpu
from dgc.core.kernels.codec_reference import Status, encode_quotients
from dgc.core.pack import (
    MAX_TOTAL_NUMEL,
    NUM_CODES,
    choose_code,
    gap_code,
    max_code_bits,
    max_index_bits,
    max_index_bytes,
)
from dgc.errors import ConfigError


def entropy_bits(numel: int, count: int) -> float:
    density = count / numel
    return -numel * (
        density * math.log2(density) + (1 - density) * math.log2(1 - density)
        if count < numel
        else 0
    )


def test_every_symbol_of_every_code_has_a_frequency() -> None:
    for code in range(NUM_CODES):
        starts = gap_code(code).starts
        assert starts[0] == 0
        assert starts[-1] == 1 << 16
        assert np.diff(starts).min() >= 1
        assert np.diff(starts).max() < 1 << 16


def test_tables_are_the_ones_of_version_1() -> None:
    """Sum of starts, weighted by place: any change of a table is a change of the format."""
    weighted = [
        int((gap_code(code).starts * np.arange(1, len(gap_code(code).starts) + 1)).sum())
        for code in (0, 1, 7, 8, 23, 39, 40, 47, 48, 255)
    ]
    assert weighted == WEIGHTED


WEIGHTED = [1310690, 1298326, 1171802, 3345152, 8648579, 107521635, 496554810, 410955946]
WEIGHTED += WEIGHTED[-2:]  # from code 40 on only the low bits differ


def test_no_processor_rounds_to_another_size() -> None:
    """Ranks must agree on sizes, which come from logarithms that CPUs round in their own ways."""
    noise = np.random.default_rng(0)

    def rounded(x: np.ndarray) -> np.ndarray:
        y: np.ndarray = log2(x)
        exact = y == np.round(y)
        return y * (1 + np.where(exact, 0, noise.uniform(-1e-12, 1e-12, y.shape)))

    log2, made = np.log2, gap_code.__wrapped__
    for code in range(NUM_CODES):
        with mock.patch.object(np, "log2", rounded):
            again = [made(code)[2:] for _ in range(4)]
        assert again == 4 * [gap_code(code)[2:]]


@pytest.mark.parametrize("density", [1e-4, 3e-4, 1e-3, 4e-3, 0.0156, 0.0625, 0.25, 0.5])
def test_bound_is_within_three_hundredths_of_a_bit_of_the_entropy(density: float) -> None:
    numel = 25_557_032
    count = int(numel * density)
    excess = (max_index_bits(numel, count) - entropy_bits(numel, count)) / count
    assert 0 <= excess <= 0.03


@given(st.integers(1, 1 << 40), st.data())
def test_bound_grows_with_the_count(numel: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, min(numel, 1 << 20)))
    fewer = data.draw(st.integers(0, count))
    best = max_code_bits(choose_code(numel, fewer), numel, fewer)
    assert best <= max_index_bits(numel, count)
    assert max_index_bytes(numel, fewer) <= max_index_bytes(numel, count)


@st.composite
def spreads(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Indices of many kinds: uniform, at one end, in rows, evenly, doubling gaps."""
    count = draw(st.integers(1, 400))
    kind = draw(st.sampled_from(["uniform", "start", "end", "rows", "even", "doubling"]))
    numel = count * draw(st.sampled_from([1, 2, 3, 10, 1000, 1 << 20]))
    if kind == "uniform":
        rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
        return np.unique(rng.integers(0, numel, count)), numel
    if kind == "doubling":
        steps = np.cumsum(2 ** np.arange(30, dtype=np.int64))
        return np.concatenate([[0], steps[steps < numel]]), numel
    base = np.arange(count, dtype=np.int64)
    if kind == "end":
        return base + numel - count, numel
    if kind == "rows":
        return np.unique(np.minimum(base + base // 16 * (numel // count), numel - 1)), numel
    return (base * (numel // count) if kind == "even" else base), numel


@settings(max_examples=300, deadline=None)
@given(spreads())
def test_no_spread_exceeds_the_bound(case: tuple[np.ndarray, int]) -> None:
    indices, numel = case
    count = len(indices)
    ends = np.array([numel])
    code = choose_code(numel, count)
    body, _, status = codec_cpu.encode(
        indices, np.ones(count, np.float32), np.array([count]), ends, code, 1
    )
    assert status is Status.OK
    assert len(body.low) + len(body.words) <= max_index_bytes(numel, count)


def test_worst_quotients_reach_the_bound_closely() -> None:
    """All gaps in one place cost what the line says: the bound is not slack."""
    code = gap_code(79)
    for quotients in ([0] * 20_000, [58] * 20_000, [0, 116] * 10_000):
        spent = 8 * len(encode_quotients(quotients, code.starts))
        line = len(quotients) * (code.index_cost - (code.low_bits << 24))
        line += sum(quotients) * code.quotient_cost
        assert spent <= line / (1 << 24) + 64
        assert spent >= 0.97 * line / (1 << 24)


@pytest.mark.parametrize(("numel", "count"), [(3, 4), (3, -1), (MAX_TOTAL_NUMEL + 1, 1)])
def test_impossible_counts_are_refused(numel: int, count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} indices in {numel}"):
        choose_code(numel, count)
