"""Positions by blocks: round trips, code length, and totality on any bytes."""

import contextlib
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgc.core import blocks, entropy
from dgc.core.blocks import Blocks, best_blocks, decode_blocks, encode_blocks
from dgc.errors import FileError


def uneven(rows: int, columns: int, density: float, seed: int) -> Tensor:
    """Rows and columns that keep very different shares."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(rows, 1, generator=generator) * torch.rand(1, columns, generator=generator)
    return torch.rand(rows, columns, generator=generator) < 4 * density * shares**2


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.02, 0.3, 1.0, 50.0]),
    st.sampled_from([1.05, *blocks.RATIOS]),
    st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_round_trip_and_length(
    rows: int, columns: int, density: float, ratio: float, seed: int
) -> None:
    kept = uneven(rows, columns, density, seed)
    found = Blocks(kept, ratio)
    assert found.counts.sum() == kept.sum()
    assert found.elements.sum() == kept.numel()
    assert max(found.counts.shape) <= blocks.MAX_CLASSES
    code = encode_blocks(kept, found)
    assert torch.equal(decode_blocks(code, rows, columns), kept)
    assert found.bits / 8 - 4 <= len(code) <= 1.01 * found.bits / 8 + 8


def test_counts_are_those_of_a_loop() -> None:
    kept = uneven(9, 14, 0.3, 0)
    found = Blocks(kept, 2.0)
    counts = np.zeros_like(found.counts)
    for i, j in kept.nonzero().tolist():
        counts[found.rows[i], found.columns[j]] += 1
    assert (counts == found.counts).all()
    for classes, sums in ((found.rows, kept.sum(1)), (found.columns, kept.sum(0))):
        assert (np.diff(classes[sums.argsort().numpy()].astype(int)) >= 0).all()


@pytest.mark.parametrize("shape", [(1, 1 << 20), (1 << 19, 2)])
def test_flat_matrices_take_little_memory(shape: tuple[int, int]) -> None:
    kept = torch.zeros(shape, dtype=torch.bool)
    kept.view(-1)[::10] = True
    tracemalloc.start()
    best_blocks(kept)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * kept.numel()


def test_dead_rows_and_columns_cost_next_to_nothing() -> None:
    live = torch.rand(50, 60, generator=torch.Generator().manual_seed(0)) < 0.5
    kept = torch.zeros(1000, 1200, dtype=torch.bool)
    kept[::20, ::20] = live
    bits = 8 * len(encode_blocks(kept, best_blocks(kept)))
    told = entropy.entropy_bits([50, 950]) + entropy.entropy_bits([60, 1140])
    assert bits <= 3000 + told + 8 * 16  # tables, shares, the last word
    assert bits < 0.35 * entropy.entropy_bits([int(kept.sum()), int((~kept).sum())])


def test_bytes_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = uneven(40, 50, 0.3, 1)
    code = encode_blocks(kept, best_blocks(kept))
    monkeypatch.setattr(blocks, "_CHUNK", 70)
    assert encode_blocks(kept, best_blocks(kept)) == code
    assert torch.equal(decode_blocks(code, 40, 50), kept)


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_any_bytes_give_a_matrix_or_an_error(raw: bytes) -> None:
    for rows, columns in ((1, 1), (6, 9)):
        try:
            kept = decode_blocks(raw, rows, columns)
        except FileError:
            continue
        assert kept.shape == (rows, columns)


def test_a_changed_byte_gives_a_matrix_or_an_error() -> None:
    kept = uneven(20, 30, 0.3, 2)
    code = encode_blocks(kept, best_blocks(kept))
    with pytest.raises(FileError):
        decode_blocks(code[:-1], 20, 30)
    with pytest.raises(FileError):
        decode_blocks(code + bytes(3) + b"\1", 20, 30)
    for at in range(len(code)):
        for value in (0, 1, 255, code[at] ^ 16):
            with contextlib.suppress(FileError):
                decode_blocks(code[:at] + bytes([value]) + code[at + 1 :], 20, 30)
