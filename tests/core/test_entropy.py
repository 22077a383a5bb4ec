"""Coders: round trips, code length against the entropy, and totality on any bytes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgc.core import entropy
from dgc.errors import FileError

SYMBOLS = st.lists(st.integers(0, 40), max_size=300)


def draw(probabilities: list[float], count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor(probabilities), count, True, generator=generator)


@given(SYMBOLS)
def test_ans_round_trip(symbols: list[int]) -> None:
    tensor = torch.tensor(symbols, dtype=torch.int64)
    table = entropy.round_counts(entropy.count_symbols(tensor, 41))
    if symbols:
        code = entropy.encode_ans(tensor, table)
        assert entropy.decode_ans(code, len(symbols), table).tolist() == symbols


def test_ans_in_pieces_is_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = draw([0.7, 0.2, 0.1], 1000)
    table = entropy.round_counts(entropy.count_symbols(symbols, 3))
    code = entropy.encode_ans(symbols, table)
    monkeypatch.setattr(entropy, "_CHUNK", 7)
    assert entropy.encode_ans(symbols, table) == code


@given(SYMBOLS)
def test_huffman_round_trip(symbols: list[int]) -> None:
    tensor = torch.tensor(symbols, dtype=torch.int64)
    lengths = entropy.huffman_lengths(entropy.count_symbols(tensor, 41))
    code = entropy.encode_huffman(tensor, lengths)
    assert entropy.decode_huffman(code, len(symbols), lengths).tolist() == symbols


@pytest.mark.parametrize(
    "probabilities",
    [
        [0.92] + [0.01] * 8,
        [0.99, 0.002, 0.003, 0.003, 0.002],
        [1 / 32] * 32,
        [0.5, 0.5],
        [0.85] + [0.15 / 255] * 255,
    ],
)
@pytest.mark.parametrize("count", [10_000, 300_000])
def test_ans_with_its_table_is_within_one_percent_of_the_entropy(
    probabilities: list[float], count: int
) -> None:
    symbols = draw(probabilities, count)
    counts = entropy.count_symbols(symbols, len(probabilities))
    table = entropy.round_counts(counts)
    bits = 8 * len(entropy.encode_ans(symbols, table))
    # One 32-bit word may be cut short and the coder keeps up to two: that is not the code's loss.
    assert bits <= 1.01 * entropy.entropy_bits(counts) + 64


def shortest(counts: list[int], limit: int) -> int:
    """Least total length of any prefix code: by Kraft, a search over all length vectors."""
    best = None
    for lengths in itertools.product(range(1, limit + 1), repeat=len(counts)):
        if sum(2.0**-n for n in lengths) <= 1:
            total = sum(c * n for c, n in zip(counts, lengths, strict=True))
            best = total if best is None else min(best, total)
    assert best is not None
    return best


@given(st.lists(st.integers(1, 50), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_huffman_is_optimal(counts: list[int]) -> None:
    lengths = entropy.huffman_lengths(counts)
    assert sum(c * n for c, n in zip(counts, lengths, strict=True)) == shortest(counts, 4)


def test_huffman_depth_is_limited_and_still_complete() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = entropy.huffman_lengths(fibonacci)
    assert max(lengths) <= entropy.MAX_CODE_BITS
    assert sum(2.0**-n for n in lengths) == 1


def test_huffman_decodes_across_chunks() -> None:
    symbols = draw([0.4, 0.3, 0.2, 0.1], 900_000)
    lengths = entropy.huffman_lengths(entropy.count_symbols(symbols, 4))
    code = entropy.encode_huffman(symbols, lengths)
    assert len(code) > 1 << 17
    assert torch.equal(entropy.decode_huffman(code, 900_000, lengths), symbols.to(torch.uint8))


def test_golden_codes() -> None:
    symbols = torch.tensor([0, 0, 1, 0, 2, 0, 0, 0, 3, 0, 0, 1])
    counts = entropy.count_symbols(symbols, 4)
    assert entropy.huffman_lengths(counts) == [1, 2, 3, 3]
    assert (
        entropy.encode_huffman(symbols, [1, 2, 3, 3]).hex() == "261c80"
    )  # by hand: 0 0 10 0 110 0 0 0 111 0 0 10
    table = entropy.round_counts(counts)
    assert table == bytes([8, 2, 1, 1])
    assert entropy.encode_ans(symbols, table).hex() == "ba366b3c33000000"


@given(st.integers(1, 15 << 30))
def test_a_rounded_count_is_within_a_sixteenth(count: int) -> None:
    (rounded,) = entropy.table_counts(entropy.round_counts([count]))
    assert rounded > 0
    assert abs(rounded - count) <= count / 16


@given(st.binary(max_size=60), st.integers(0, 100), st.binary(max_size=20))
@settings(max_examples=300)
def test_ans_decoding_is_total(code: bytes, count: int, table: bytes) -> None:
    try:
        symbols = entropy.decode_ans(code, count, table)
    except FileError:
        return
    assert symbols.shape == (count,)
    assert all(table[s] > 0 for s in symbols.tolist())


@given(st.binary(max_size=60), st.integers(0, 500), st.lists(st.integers(0, 16), max_size=12))
@settings(max_examples=300)
def test_huffman_decoding_is_total(code: bytes, count: int, lengths: list[int]) -> None:
    try:
        symbols = entropy.decode_huffman(code, count, lengths)
    except FileError:
        return
    assert entropy.encode_huffman(symbols, lengths) == code


@given(st.binary(min_size=1, max_size=60), st.integers(1, 200))
@settings(max_examples=300)
def test_huffman_decoding_is_total_with_a_real_table(code: bytes, count: int) -> None:
    lengths = [1, 2, 3, 0, 3]
    try:
        symbols = entropy.decode_huffman(code, count, lengths)
    except FileError:
        return
    assert entropy.encode_huffman(symbols, lengths) == code


def test_an_unknown_symbol_is_refused() -> None:
    with pytest.raises(ValueError, match="no count"):
        entropy.encode_ans(torch.tensor([0, 3]), bytes([1, 1, 1, 0]))
    with pytest.raises(ValueError, match="no Huffman code"):
        entropy.encode_huffman(torch.tensor([0, 3]), [1, 1, 0, 0])
    with pytest.raises(ValueError, match="at most"):
        entropy.round_counts([1 << 40])
