"""Gradient messages: every way in which bytes can be wrong gives a `WireError`, within bounds."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_wire import ALLOCATION_FACTOR, ALLOCATION_FIXED, check, mutate, seal, seeds
from dgc.core import Sparse
from dgc.core.varint import varint
from dgc.errors import WireError
from dgc.train import wire


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def bytes_of(message: torch.Tensor) -> bytes:
    return bytes(message.tolist())


def sparse(numel: int, count: int, seed: int) -> Sparse:
    """`count` of `numel` elements, spread evenly, with small values."""
    j = torch.arange(count)
    return Sparse(j * numel // max(1, count), (j + seed) % 5 - 2.5, numel)


VALID = bytes_of(wire.encode([sparse(3000, 3, 0), sparse(50, 5, 1)], 4))
HUGE = varint((1 << 49) - 1)


def altered(at: int, *values: int) -> bytes:
    return VALID[:at] + bytes(values) + VALID[at + len(values) :]


def with_tables(tables: bytes, rest: bytes = b"", flags: int = 3, code: int = 0) -> bytes:
    """A sealed message of the given bytes after the fixed part."""
    return seal(b"DGC\x01" + bytes([flags, code]) + bytes(4) + tables + rest + bytes(4))


HOSTILE = {
    "empty": (b"", "0 bytes: a message has at least 14"),
    "short": (VALID[:9], "9 bytes"),
    "cut": (VALID[:-1], "cut short"),
    "length beyond": (altered(6, 0xFF, 0xFF, 0xFF, 0xFF), "length is 4294967295"),
    "length too small": (altered(6, 3, 0, 0, 0), "length is 3"),
    "magic": (altered(0, 0x45), "magic is 454743"),
    "version": (altered(3, 2), "version is 2"),
    "checksum": (altered(len(VALID) - 1, VALID[-1] ^ 1), "checksum"),
    "damage": (altered(20, VALID[20] ^ 1), "checksum"),
    "padding": (VALID + b"\0\1", "other than zero"),
    "flag": (seal(altered(4, 0x43)), "flags are 0x43"),
    "width": (seal(altered(4, 7)), "flags are 0x07"),
    "no tables": (with_tables(b""), "number of tensors"),
    "endless varint": (with_tables(b"\xff" * 9), "number of tensors"),
    "long varint": (with_tables(b"\x81\x00\x05\x00"), "number of tensors"),
    "many tensors": (with_tables(HUGE), "562949953421311 tensors in 0 bytes"),
    "many elements": (with_tables(b"\x01" + HUGE + b"\0"), "elements in all: at most"),
    "too many values": (with_tables(b"\x01\x05\x06"), "6 values for tensors of 5"),
    "no values": (with_tables(b"\x01\x05"), "number of values"),
    "many values": (with_tables(b"\x01" + varint(1 << 47) + varint(1 << 46)), "bytes for 70368"),
    "values not finite": (with_tables(b"\x01\x05\x01", bytes(16), flags=11), "not finite"),
    "code without values": (with_tables(b"\x01\x05\x00", code=9), "gap code 9"),
    "body without values": (with_tables(b"\x01\x05\x00", b"\0"), "1 bytes follow"),
    "bitmap cut": (with_tables(b"\x01\x05", flags=19), "0 bytes of the 1"),
    "bitmap full": (with_tables(b"\x01\x05\x01\x00", flags=19), "name none of them"),
    "bitmap too wide": (with_tables(b"\x01\x05\x02\x00", flags=19), "one too many"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames(name: str) -> None:
    data, text = HOSTILE[name]
    with pytest.raises(WireError, match=text):
        wire.decode(tensor_of(data))


START = b"\x01\x00\x00\x00\x00\x00\x00\x00"
"""Words of state 2^32: one bit was written."""


def body(
    parameters: bytes = b"\x80\x3f\x80\x3f",
    codes: bytes = b"\x00",
    words: bytes = START,
    **more: Any,
) -> bytes:
    """One value of one tensor of 5 elements, without low bits."""
    return with_tables(b"\x01\x05\x01", parameters + codes + words, code=8, **more)


HOSTILE_BODIES = {
    "infinite level": (body(b"\x80\x3f\x80\x7f"), "level is not finite"),
    "nan level": (body(b"\xc0\x7f\xc0\x7f"), "level is not finite"),
    "levels descend": (body(b"\x81\x3f\x80\x3f"), "lies above"),
    "negative level": (body(b"\x80\x3f\x80\xbf"), "level is not finite"),
    "infinite one-bit level": (body(b"\x80\x7f", flags=0), "level is not finite"),
    "zero one-bit level": (body(b"\x00\x80", flags=0), "level is not finite"),
    "infinite value": (body(b"", b"\x00\x00\x80\xff", flags=6), "value is not finite"),
    "nan value": (body(b"", b"\x01\x00\x80\x7f", flags=6), "value is not finite"),
    "fill": (body(codes=b"\x10"), "fill up a section"),
    "low state": (body(words=b"\x00\x00\x00\x00\xff\xff\xff\x7f"), "state is out of range"),
    "high state": (body(words=b"\x00\x00\x00\x80\x00\x00\x00\x00"), "state is out of range"),
    "words end": (body(words=b"\x00\x00\x00\x00\x00\x00\x00\x80"), "ends before"),
    "words left": (body(words=START + bytes(4)), "goes on after"),
    "last state": (body(words=b"\x02\x00\x00\x00\x00\x00\x00\x00"), "goes on after"),
    "odd words": (body(words=START + b"\0"), "multiple of 4"),
    "outside": (body(words=b"\x00\x01\x00\x00\x00\xfc\x00\x00"), "outside the tensors"),
}


RICE = 0x20


def rice_body(unary: bytes, low: bytes = b"", code: int = 0) -> bytes:
    """One value of one tensor of 5 elements."""
    sections = b"\x80\x3f\x80\x3f" + low + b"\x00" + unary
    return with_tables(b"\x01\x05\x01", sections, flags=3 | RICE, code=code)


HOSTILE_BODIES |= {
    "no one bit": (rice_body(b"\x00"), "ends before"),
    "two one bits": (rice_body(b"\x03"), "goes on after"),
    "a byte too many": (rice_body(b"\x01\x00"), "goes on after"),
    "no quotients": (rice_body(b""), "6 and a multiple of 1 beyond"),
    "outside by one": (rice_body(b"\x20"), "outside the tensors"),
    "far outside": (rice_body(bytes(9) + b"\x80"), "outside the tensors"),
    "low bits outside": (rice_body(b"\x01", b"\x05" + bytes(5), code=47), "outside the tensors"),
    "low bits' fill": (rice_body(b"\x01", bytes(5) + b"\x80", code=47), "fill up a section"),
    "too many low bits": (rice_body(b"\x01", bytes(6), code=48), "48 low bits: at most 47"),
}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_hostile_bodies(name: str) -> None:
    data, text = HOSTILE_BODIES[name]
    with pytest.raises(WireError, match=text):
        wire.decode(tensor_of(data))


def test_the_hostile_bodies_spoil_a_valid_one() -> None:
    for valid in (body(), rice_body(b"\x01")):
        (found,) = wire.decode(tensor_of(valid))
        assert (found.indices.tolist(), found.values.tolist()) == ([0], [1.0])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_random_bytes(tail: bytes, sealed: bool) -> None:
    check(with_tables(tail[1:], flags=tail[0] % 64, code=tail[-1]) if sealed and tail else tail)


def test_mutated_messages() -> None:
    rng = np.random.default_rng(0)
    corpus = seeds(rng)
    verdicts = {check(mutate(rng, corpus[n % len(corpus)])) for n in range(3000)}
    assert "valid" in verdicts
    assert len(verdicts) > 10


@pytest.mark.parametrize("bits", [1, 32])
def test_memory_for_decoding_is_bounded(bits: int) -> None:
    """One bit a value and nothing but neighbours expands most."""
    data = bytes_of(wire.encode([sparse(200_000, 200_000, 0)], bits))
    many = bytes_of(wire.encode([sparse(1, 0, 0)] * 20_000 + [sparse(1, 1, 0)], bits))
    for each in (data, many):
        tracemalloc.start()
        wire.decode_batch(tensor_of(each))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= ALLOCATION_FACTOR * len(each) + ALLOCATION_FIXED
