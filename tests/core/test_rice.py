"""The room for Rice coded indices: enough for what is drawn at random, and never too little."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgc.core.pack import MAX_TOTAL_NUMEL
from dgc.core.rice import most_bits, rice_bytes, rice_code
from dgc.errors import ConfigError
from tests.core.test_pack import spreads


def spent(indices: np.ndarray, low_bits: int) -> int:
    gaps = np.diff(indices, prepend=-1) - 1
    return int((gaps >> low_bits).sum()) + len(indices) * (low_bits + 1)


@pytest.mark.parametrize("numel", [10_000, 1_000_000])
@pytest.mark.parametrize("density", [0.5, 0.25, 0.0625, 0.01, 0.004, 0.001])
def test_indices_drawn_at_random_have_room(numel: int, density: float) -> None:
    rng, count = np.random.default_rng(0), int(numel * density)
    code = rice_code(numel, count)
    entropy = -math.log2(density) - (1 / density - 1) * math.log2(1 - density)
    for _ in range(20):
        indices = np.sort(rng.choice(numel, count, replace=False))
        assert spent(indices, code.low_bits) <= code.room
    if count >= 1000:
        assert code.room / count <= entropy + 0.15 + 3 / math.sqrt(count)


@settings(max_examples=300, deadline=None)
@given(spreads())
def test_no_spread_exceeds_the_most(case: tuple[np.ndarray, int]) -> None:
    indices, numel = case
    code = rice_code(numel, len(indices))
    assert spent(indices, code.low_bits) <= most_bits(numel, len(indices), code.low_bits)
    kept = indices[: code.fewer]
    assert spent(kept, code.low_bits) <= code.room


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 1 << 40), st.data())
def test_room_grows_with_the_count(numel: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, min(numel, 1 << 20)))
    assert rice_bytes(numel, data.draw(st.integers(0, count))) <= rice_bytes(numel, count)


@pytest.mark.parametrize(("numel", "count"), [(3, 4), (3, -1), (MAX_TOTAL_NUMEL + 1, 1)])
def test_impossible_counts_are_refused(numel: int, count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} indices in {numel}"):
        rice_code(numel, count)
