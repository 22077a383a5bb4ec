"""Levels, and what quantising does to the values that a selection gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgc.core.kernels.codec_reference import dequantize, quantize
from dgc.core.quantize import MAX_FINITE, VALUE_BITS, ZERO_LEVEL, check_value_bits, levels
from dgc.errors import ConfigError

LOW_BITS = [bits for bits in VALUE_BITS if bits < 32]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def requantized(values: list[float] | np.ndarray, bits: int) -> np.ndarray:
    data = np.array(values, np.float32)
    counts = np.array([len(data)])
    parameters, codes = quantize(data, counts, bits)
    return dequantize(codes, parameters, counts, bits)


def relative_error(values: np.ndarray, bits: int) -> float:
    wide = values.astype(np.float64)
    return float(((wide - requantized(values, bits)) ** 2).sum() / (wide**2).sum())


@given(
    st.integers(0, MAX_FINITE), st.integers(0, MAX_FINITE), st.booleans(), st.sampled_from(LOW_BITS)
)
def test_levels_ascend_and_are_finite(a: int, b: int, zero: bool, bits: int) -> None:
    lo, hi = min(a, b), max(a, b)
    found = levels(lo | ZERO_LEVEL * (zero and bits > 1), hi, bits)
    assert len(found) == 1 << (bits - 1)
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()
    assert found[0] >= 0
    assert not (zero and bits > 1) or found[0] == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=1, max_size=40), st.sampled_from(VALUE_BITS))
def test_any_finite_values_stay_finite_and_keep_their_sign(values: list[float], bits: int) -> None:
    found = requantized(values, bits)
    assert np.isfinite(found).all()
    assert (np.signbit(found) == np.signbit(np.array(values, np.float32))).all()
    if bits == 32:
        assert found.tobytes() == np.array(values, np.float32).tobytes()


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 0.1, -3.0, 3.3e38, 3.4028235e38])
def test_equal_values_keep_eight_bits(bits: int, value: float) -> None:
    found = requantized([value] * 3, bits)
    step = max(abs(value) * 2.0**-8, 2.0**-134)
    assert np.abs(found.astype(np.float64) - np.float32(value)).max() <= step


@pytest.mark.parametrize("bits", [bits for bits in LOW_BITS if bits > 1])
def test_zeros_stay_zero_beside_other_values(bits: int) -> None:
    found = requantized([0.0, 1.0, -0.0, -1.0, 0.0], bits)
    assert (found == [0, 1, 0, -1, 0]).all()


@pytest.mark.parametrize("name", ["laplace", "normal", "student"])
@pytest.mark.parametrize(("bits", "most"), [(1, 0.3), (2, 0.2), (3, 0.06), (4, 0.02), (8, 1e-4)])
def test_error_on_the_tails_that_selection_leaves(name: str, bits: int, most: float) -> None:
    """Relative squared error of the top 0.1 %; Student's t with 3 degrees is the hardest."""
    rng = np.random.default_rng(0)
    everything = {
        "laplace": lambda: rng.laplace(size=1_000_000),
        "normal": lambda: rng.normal(size=1_000_000),
        "student": lambda: rng.standard_t(3, size=1_000_000),
    }[name]()
    tail = everything[np.abs(everything) >= np.sort(np.abs(everything))[-1000]].astype(np.float32)
    assert relative_error(tail, bits) <= most


def test_sixteen_bits_beat_bfloat16_by_far() -> None:
    values = np.random.default_rng(0).laplace(size=4000).astype(np.float32) + np.float32(8)
    assert relative_error(values, 16) < 1e-8  # bfloat16: 1e-6


@pytest.mark.parametrize("bits", [0, 5, 7, 64, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"value_bits is {bits}"):
        check_value_bits(bits)
