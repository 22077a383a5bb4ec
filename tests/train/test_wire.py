"""Gradient messages: round trip, bounds, adding to dense gradients, fixed bytes."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgc.core import Sparse, SparseBatch
from dgc.core.quantize import VALUE_BITS
from dgc.errors import ConfigError, GradientError, WireError
from dgc.train import wire


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def bytes_of(message: torch.Tensor) -> bytes:
    return bytes(message.tolist())


def sparse(numel: int, count: int, seed: int) -> Sparse:
    """`count` of `numel` elements, spread evenly; values ±0.5 to ±6.5, computed exactly."""
    j = torch.arange(count)
    values = ((j * 7 + seed) % 13 + 1).float() / 2 * (1 - 2 * (j % 3 == 0).float())
    return Sparse(j * numel // max(1, count), values, numel)


@st.composite
def sparse_lists(draw: Any) -> list[Sparse]:
    out = []
    for numel in draw(st.lists(st.integers(0, 200), max_size=6)):
        some = st.sets(st.integers(0, numel - 1), max_size=numel) if numel else st.just(set())
        indices = torch.tensor(sorted(draw(some)), dtype=torch.int64)
        seed = draw(st.integers(0, 1 << 30))
        values = torch.randn(len(indices), generator=torch.Generator().manual_seed(seed))
        out.append(Sparse(indices, values, numel))
    return out


@settings(max_examples=200, deadline=None)
@given(sparse_lists(), st.sampled_from(VALUE_BITS), st.integers(0, 20))
def test_round_trip_within_the_bound(tensors: list[Sparse], bits: int, padding: int) -> None:
    message = wire.encode(tensors, bits)
    counts = [len(each.indices) for each in tensors]
    assert message.numel() <= wire.max_message_bytes([t.numel for t in tensors], counts, bits)
    found = wire.decode(torch.cat([message, torch.zeros(padding, dtype=torch.uint8)]))
    assert len(found) == len(tensors)
    for sent, got in zip(tensors, found, strict=True):
        assert torch.equal(sent.indices, got.indices)
        assert sent.numel == got.numel
        assert torch.equal(torch.signbit(sent.values), torch.signbit(got.values))
        if bits == 32:
            assert torch.equal(sent.values, got.values)


@settings(max_examples=100, deadline=None)
@given(sparse_lists(), st.sampled_from(VALUE_BITS), st.data())
def test_the_sender_knows_what_arrives(
    tensors: list[Sparse], bits: int, data: st.DataObject
) -> None:
    tensors = [*tensors, sparse(10, 2, 0)]
    used = data.draw(st.lists(st.booleans(), min_size=len(tensors), max_size=len(tensors)))
    batch = SparseBatch.cat(tensors)
    size = wire.max_message_bytes(batch.numels, batch.counts, bits)
    message, values = wire.encode_batch(batch, bits, message_bytes=size, used=used)
    assert message.numel() == size
    found = wire.decode_batch(message, batch.numels)
    assert torch.equal(found.batch.values.view(torch.int32), values.view(torch.int32))
    assert torch.equal(found.batch.indices, batch.indices)
    assert (found.batch.counts, found.batch.numels) == (batch.counts, batch.numels)
    assert (found.finite, found.used) == (True, tuple(used))


def test_the_mean_equals_dense_arithmetic_bit_for_bit() -> None:
    numels = [40_000, 1, 0, 7, 100_000]
    grads = [torch.arange(numel).float() for numel in numels]
    scales = [0.5, 0.25, 1.0, 3.0, 0.1]
    messages, expected = [], [torch.zeros_like(grad) for grad in grads]
    for rank in range(3):
        tensors = [sparse(numel, numel // 7 + (numel > 0), rank) for numel in numels]
        message = wire.encode(tensors, 4)
        messages.append(message)
        for dense, got, scale in zip(expected, wire.decode(message), scales, strict=True):
            dense[got.indices] += got.values * np.float32(scale)
    heads = wire.set_mean_(messages, grads, scales)
    assert [head.num_values for head in heads] == [sum(len(t.indices) for t in tensors)] * 3
    for dense, grad in zip(expected, grads, strict=True):
        assert torch.equal(dense, grad)


def test_other_devices_add_the_same() -> None:
    """Where the gradients are not on the CPU, torch adds; here it is given CPU tensors."""
    numels, scales = (40_000, 1, 7), np.array([0.5, 3.0, 0.1], np.float32)
    messages = [wire.encode([sparse(n, n // 7 + 1, rank) for n in numels], 3) for rank in range(2)]
    expected, grads = ([torch.ones(n) for n in numels] for _ in range(2))
    decoded = [wire._decode(message.numpy(), numels) for message in messages]
    wire._set_on_device_(decoded, grads, scales)
    wire.set_mean_(messages, expected, scales.tolist())
    assert all(torch.equal(a, b) for a, b in zip(expected, grads, strict=True))


def test_no_message_and_no_tensor() -> None:
    grad = torch.ones(3)
    assert wire.set_mean_([], [grad], 1.0) == []
    assert grad.tolist() == [0, 0, 0]
    assert wire.decode(wire.encode([], 4)) == []


def test_a_wrong_message_leaves_the_gradients_alone() -> None:
    good, bad = wire.encode([sparse(9, 3, 0)], 4), wire.encode([sparse(8, 3, 0)], 4)
    grads = [torch.ones(9)]
    with pytest.raises(WireError, match=r"1 tensors of 8 elements, expected 1 of 9"):
        wire.set_mean_([good, bad], grads, 1.0)
    with pytest.raises(WireError, match="checksum"):
        wire.set_mean_([good ^ (torch.arange(len(good)) == len(good) - 1)], grads, 1.0)
    assert grads[0].tolist() == [1.0] * 9


def test_not_finite_travels() -> None:
    batch = SparseBatch.cat([sparse(100, 5, 0), sparse(3, 1, 0)])
    batch.values[2] = float("nan")
    for finite in (True, False):
        message, values = wire.encode_batch(
            batch, 4, message_bytes=60, finite=finite, used=[True, False]
        )
        assert values.tolist() == [0.0] * 6
        found = wire.decode_batch(message)
        assert (found.finite, found.used, found.batch.counts) == (False, (True, False), (0, 0))
        grads = [torch.ones(100), torch.ones(3)]
        (head,) = wire.set_mean_([message], grads, 1.0)
        assert not head.finite
        assert all((grad == 0).all() for grad in grads)
    with pytest.raises(GradientError, match="NaN or infinite"):
        wire.encode(batch.split(), 4)


def test_addresses_beyond_32_bits() -> None:
    numel = 1 << 40
    indices = torch.tensor([0, 5, 1 << 33, numel - 1])
    message = wire.encode([Sparse(indices, torch.ones(4), numel), sparse(3, 1, 0)], 3)
    assert torch.equal(wire.decode(message)[0].indices, indices)
    assert message.numel() <= wire.max_message_bytes([numel, 3], [4, 1], 3)


@pytest.mark.parametrize(
    ("indices", "counts", "numels", "text"),
    [
        ([3, 3], (2,), (9,), "must ascend"),
        ([3, 2], (2,), (9,), "must ascend"),
        ([-1, 2], (2,), (9,), "must ascend"),
        ([1, 9], (2,), (9,), "must ascend"),
        ([1, 4, 2], (2, 1), (4, 4), "must ascend"),
        ([1, 2, 3], (2,), (9,), "hold 3, 3 and 2"),
        ([1, 2], (2,), (9, 9), "1 counts for 2 tensors"),
        ([], (0,), (-1,), "hold"),
    ],
)
def test_impossible_batches_are_refused(
    indices: list[int], counts: tuple[int, ...], numels: tuple[int, ...], text: str
) -> None:
    batch = SparseBatch(
        torch.tensor(indices, dtype=torch.int64), torch.ones(len(indices)), counts, numels
    )
    with pytest.raises(ConfigError, match=text):
        wire.encode_batch(batch, 4, message_bytes=100)


def test_other_wrong_arguments_are_refused() -> None:
    batch = SparseBatch.cat([sparse(100, 5, 0)])
    with pytest.raises(ConfigError, match="message_bytes is 20"):
        wire.encode_batch(batch, 4, message_bytes=20)
    with pytest.raises(ConfigError, match="value_bits is 5"):
        wire.encode(batch.split(), 5)
    with pytest.raises(ConfigError, match="101 values in a tensor of 100"):
        wire.max_message_bytes([100], [101], 4)
    with pytest.raises(ConfigError, match="4 GiB"):
        wire.max_message_bytes([1 << 40], [1 << 31], 32)
    with pytest.raises(ConfigError, match="give contiguous float32"):
        wire.set_mean_([wire.encode(batch.split(), 4)], [torch.ones(10, 10).t()], 1.0)
    with pytest.raises(WireError, match="float32"):
        wire.decode(torch.zeros(30))


# 3 values at 3, 40, 1000 of 3000: the worked example of docs/wire.md is the one of 4 bits.
EXAMPLE = Sparse(torch.tensor([3, 40, 1000]), torch.tensor([1.0, -2.0, 4.0]), 3000)
GOLDEN = {
    1: "44474301 00501f00000001b817031540837c0203a60000a302e12f4bbbaffb",
    2: "44474301 01502100000001b81703c03f8040837c1803a60000a302e12fc5c00835",
    3: "44474301 02502200000001b81703803f8040837ce80003a60000a302e12ffeee45c5",
    4: "44474301 03502200000001b81703803f8040837cb00703a60000a302e12f1ce3faec",
    8: "44474301 04502300000001b81703803f8040837c00bf7f03a60000a302e12fdc270634",
    16: "44474301 05502600000001b81703803f8040837c0000ffbfff7f03a60000a302e12f55922c60",
    32: "44474301 06502800000001b81703837c0000803f000000c00000804003a60000a302e12fd5ef4a8b",
}


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_golden_bytes(bits: int) -> None:
    assert bytes_of(wire.encode([EXAMPLE], bits)) == bytes.fromhex(GOLDEN[bits])


def test_the_document_shows_these_bytes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    shown = "".join(
        line for line in text.splitlines() if line.startswith("    44 47 43")
    ) + "".join(line for line in text.splitlines() if line.startswith("    83 7c"))
    assert bytes.fromhex(shown) == bytes.fromhex(GOLDEN[4])
    assert [
        round(v, 3) for v in wire.decode(tensor_of(bytes.fromhex(shown)))[0].values.tolist()
    ] == [
        1.0,
        -1.857,
        4.0,
    ]
    assert wire.max_message_bytes([3000], [3], 4) == 39


GOLDEN_SIZES = {
    (1, 0.0001): (37, 0x5C6BAC4E),
    (1, 0.001): (63, 0x0231B0F2),
    (1, 0.01): (262, 0x47DC71D5),
    (1, 0.25): (2725, 0x7EAEDAC2),
    (1, 1.0): (2573, 0x90949BC2),
    (2, 0.0001): (41, 0x98EEBDC9),
    (2, 0.001): (70, 0xAC2AAE09),
    (2, 0.01): (291, 0x5349E681),
    (2, 0.25): (3363, 0x5442ECBF),
    (2, 1.0): (5114, 0x10EBF430),
    (3, 0.0001): (42, 0x319A7711),
    (3, 0.001): (72, 0x77FC101E),
    (3, 0.01): (317, 0xC7BC709A),
    (3, 0.25): (3998, 0xD6B1BA78),
    (3, 1.0): (7652, 0x3D747181),
    (4, 0.0001): (42, 0xAA6CD088),
    (4, 0.001): (75, 0x09AE895B),
    (4, 0.01): (342, 0x7A9C2EA7),
    (4, 0.25): (4632, 0x896F7C04),
    (4, 1.0): (10189, 0x22A3E3EE),
    (8, 0.0001): (43, 0x0CDD12E9),
    (8, 0.001): (85, 0x8F5D11A7),
    (8, 0.01): (443, 0x537F9741),
    (8, 0.25): (7169, 0xC8E14AF7),
    (8, 1.0): (20339, 0xA306C2A8),
    (16, 0.0001): (46, 0x117562D5),
    (16, 0.001): (106, 0xDE594A7D),
    (16, 0.01): (646, 0xE8910351),
    (16, 0.25): (12244, 0x3BCAF173),
    (16, 1.0): (40639, 0x356353EA),
    (32, 0.0001): (44, 0xC58BAB5D),
    (32, 0.001): (140, 0x3EA057C3),
    (32, 0.01): (1044, 0x97D06130),
    (32, 0.25): (22386, 0x73CDE8C3),
    (32, 1.0): (81231, 0xCBE036ED),
}


@pytest.mark.parametrize("density", [0.0001, 0.001, 0.01, 0.25, 1.0])
@pytest.mark.parametrize("bits", VALUE_BITS)
def test_golden_checksums(bits: int, density: float) -> None:
    """Length and CRC-32 of two tensors' messages; the checksum covers every byte before it."""
    tensors = [sparse(n, max(1, int(n * density)), n) for n in (20_000, 300)]
    message = bytes_of(wire.encode(tensors, bits))
    assert (len(message), zlib.crc32(message[:-4])) == GOLDEN_SIZES[bits, density]
