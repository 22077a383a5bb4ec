"""Header, tables and checksum around the body of a gradient message: the layout of docs/wire.md."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dgc.core.pack import (
    MAX_TOTAL_NUMEL,
    STATE_BYTES,
    max_index_bytes,
)
from dgc.core.quantize import VALUE_BITS, check_value_bits, parameter_bytes
from dgc.core.rice import MAX_LOW_BITS, low_bits_of, rice_bytes
from dgc.core.varint import varint
from dgc.errors import ConfigError, WireError

MAGIC = b"DGC"
VERSION = 1
MAX_MESSAGE_BYTES = (1 << 32) - 1

FIXED_BYTES = 10
CHECKSUM_BYTES = 4
WIDTH_MASK, NOT_FINITE, SOME_UNUSED, RICE = 0x07, 0x08, 0x10, 0x20
_MAX_VARINT_BYTES = 7

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Header:
    """What a message says beside its indices and values.

    Attributes:
        numels: number of elements of each of the T tensors.
        num_values: how many values it carries, K.
        value_bits: width of a value code.
        finite: False if its sender met a gradient that is not finite; then it carries no values.
        used: for each tensor, whether it had a gradient on the sender.
        code: number of the gap code, or the Rice code's low bits; 0 when there are no values.
        rice: whether indices are Rice coded.
        message_bytes: length without padding.
    """

    numels: tuple[int, ...]
    num_values: int
    value_bits: int
    finite: bool
    used: tuple[bool, ...]
    code: int
    rice: bool
    message_bytes: int


class Sections(NamedTuple):
    """Where the four sections of the body begin, and where the last one ends."""

    parameters: int
    low: int
    codes: int
    words: int
    end: int


def max_frame_bytes(
    numels: Sequence[int], counts: Sequence[int], value_bits: int, rice: bool = False
) -> int:
    """Bytes of a message of at most `counts` values; see `dgc.train.wire.max_message_bytes`."""
    check_value_bits(value_bits)
    for numel, count in zip(numels, counts, strict=True):
        if not 0 <= count <= numel:
            raise ConfigError(f"{count} values in a tensor of {numel} elements: give 0 to numel")
    total, count = sum(numels), sum(counts)
    size = (
        FIXED_BYTES
        + len(_tables(tuple(numels)))
        + -(-len(numels) // 8)
        + len(varint(count))
        + len(numels) * parameter_bytes(value_bits) * (count > 0)
        + -(-count * value_bits // 8)
        + (rice_bytes if rice else max_index_bytes)(total, count)
        + CHECKSUM_BYTES
    )
    if size > MAX_MESSAGE_BYTES:
        raise ConfigError(f"a message of {size} bytes is over 4 GiB: use smaller buckets")
    return size


def write_frame(
    numels: tuple[int, ...],
    count: int,
    code: int,
    value_bits: int,
    *,
    finite: bool,
    used: Sequence[bool] | None,
    body: Sequence[bytes],
) -> bytes:
    """A whole message, without padding."""
    content = bytearray(frame_head(numels, value_bits, code, used))
    content[4] |= 0 if finite else NOT_FINITE
    content += b"".join((varint(count), *body))
    content[6:FIXED_BYTES] = (len(content) + CHECKSUM_BYTES).to_bytes(4, "little")
    return bytes(content) + zlib.crc32(content).to_bytes(4, "little")


def frame_head(
    numels: tuple[int, ...],
    value_bits: int,
    code: int,
    used: Sequence[bool] | None,
    rice: bool = False,
) -> bytes:
    """A message up to the number of values, for a finite gradient; its length is left zero."""
    flags, bitmap = VALUE_BITS.index(value_bits) | (RICE if rice else 0), b""
    if used is not None and not all(used):
        flags |= SOME_UNUSED
        bitmap = np.packbits(np.array(used, bool), bitorder="little").tobytes()
    return MAGIC + bytes([VERSION, flags, code, 0, 0, 0, 0]) + _tables(numels) + bitmap


def read_frame(message: Bytes, numels: tuple[int, ...] | None) -> tuple[Header, Sections]:
    """Header and sections of a message; the bodies' contents are not looked at.

    Raises:
        WireError: the sizes do not fit together, the checksum is wrong, or the message is for
            other tensors than `numels`.
    """
    length, flags, code = _read_fixed(message)
    end = length - CHECKSUM_BYTES
    data = message[:end].tobytes()
    found_numels, at = _read_tables(data, numels)
    used, at = _read_used(data, at, len(found_numels), flags)
    count, at = read_varint(data, at, "number of values")
    finite = not flags & NOT_FINITE
    rice, value_bits = bool(flags & RICE), VALUE_BITS[flags & WIDTH_MASK]
    header = Header(found_numels, count, value_bits, finite, used, code, rice, length)
    if count > sum(found_numels):
        raise WireError(f"{count} values for tensors of {sum(found_numels)} elements in all")
    if count == 0 and code:
        raise WireError(f"gap code {code} in a message without values")
    if rice and code > MAX_LOW_BITS:
        raise WireError(f"a Rice code with {code} low bits: at most {MAX_LOW_BITS}")
    if count and not finite:
        raise WireError(f"{count} values in a message marked as not finite")
    return header, _sections(header, at, end)


def _read_fixed(message: Bytes) -> tuple[int, int, int]:
    """Length, flags and gap code, after everything that needs no parsing has been checked."""
    head = message[:FIXED_BYTES].tobytes()
    if len(head) < FIXED_BYTES:
        raise WireError(f"{len(head)} bytes: a message has at least {FIXED_BYTES + CHECKSUM_BYTES}")
    if head[:3] != MAGIC:
        raise WireError(
            f"magic is {head[:3].hex()}, not {MAGIC.hex()}: this is not a gradient message (do all ranks "
            "make the same calls, as of checkpoint.save?)"
        )
    if head[3] != VERSION:
        raise WireError(f"version is {head[3]}, this library reads {VERSION}: upgrade all ranks")
    length = int.from_bytes(head[6:10], "little")
    if not FIXED_BYTES + CHECKSUM_BYTES <= length <= len(message):
        raise WireError(f"length is {length}, {len(message)} bytes were given: cut short?")
    end = length - CHECKSUM_BYTES
    found, stored = (
        zlib.crc32(message[:end].data),
        int.from_bytes(message[end:length].tobytes(), "little"),
    )
    if found != stored:
        raise WireError(f"checksum is {found:08x}, the message says {stored:08x}: it was damaged")
    if message[length:].any():
        raise WireError(f"bytes other than zero follow the message's {length} bytes")
    flags = head[4]
    if flags & ~(WIDTH_MASK | NOT_FINITE | SOME_UNUSED | RICE) or flags & WIDTH_MASK == WIDTH_MASK:
        raise WireError(f"flags are {flags:#04x}: a bit or width that version {VERSION} has not")
    return length, flags, head[5]


def _read_tables(data: bytes, numels: tuple[int, ...] | None) -> tuple[tuple[int, ...], int]:
    if numels is not None:
        expected = _tables(numels)
        at = FIXED_BYTES + len(expected)
        if data[FIXED_BYTES:at] == expected:
            return numels, at
    found = []
    num_tensors, at = read_varint(data, FIXED_BYTES, "number of tensors")
    if num_tensors > len(data) - at:
        raise WireError(f"{num_tensors} tensors in {len(data) - at} bytes")
    for _ in range(num_tensors):
        numel, at = read_varint(data, at, "number of elements")
        found.append(numel)
    if sum(found) > MAX_TOTAL_NUMEL:
        raise WireError(f"{sum(found)} elements in all: at most {MAX_TOTAL_NUMEL} are possible")
    if numels is not None:
        raise WireError(
            f"the message is for {len(found)} tensors of {_few(found)} elements, "
            f"expected {len(numels)} of {_few(numels)}"
        )
    return tuple(found), at


def _read_used(data: bytes, at: int, num_tensors: int, flags: int) -> tuple[tuple[bool, ...], int]:
    if not flags & SOME_UNUSED:
        return (True,) * num_tensors, at
    size = -(-num_tensors // 8)
    raw = np.frombuffer(data[at : at + size], np.uint8)
    if len(raw) < size:
        raise WireError(f"{len(raw)} bytes of the {size} that flag unused tensors")
    bits = np.unpackbits(raw, bitorder="little").astype(bool)
    used = tuple(bits[:num_tensors].tolist())
    if bits[num_tensors:].any() or all(used):
        raise WireError("the flags of unused tensors name none of them, or one too many")
    return used, at + size


def _sections(header: Header, at: int, end: int) -> Sections:
    """Cut [at, end) into sections; the last one takes what is left."""
    count, bits = header.num_values, header.value_bits
    if count == 0:
        if at != end:
            raise WireError(f"{end - at} bytes follow the tables of a message without values")
        return Sections(at, at, at, at, at)
    low = at + len(header.numels) * parameter_bytes(bits)
    codes = low + -(-count * low_bits_of(header.code, header.rice) // 8)
    words = codes + -(-count * bits // 8)
    least, step = (-(-count // 8), 1) if header.rice else (STATE_BYTES, 4)
    if words + least > end or (end - words) % step:
        raise WireError(
            f"{end - at} bytes for {count} values of {bits} bits in {len(header.numels)} tensors: "
            f"{words + least - at} and a multiple of {step} beyond are needed"
        )
    return Sections(at, low, codes, words, end)


@lru_cache(maxsize=1024)
def _tables(numels: tuple[int, ...]) -> bytes:
    return varint(len(numels)) + b"".join(map(varint, numels))


def read_varint(data: bytes, at: int, what: str) -> tuple[int, int]:
    """The number at `at`, of at most seven bytes and none too many, and where it ends."""
    number = 0
    for size, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << (7 * size)
        if byte < 0x80:
            if byte == 0 and size:
                break
            return number, at + size + 1
    raise WireError(f"{what} is not a number of 1 to {_MAX_VARINT_BYTES} bytes at byte {at}")


def _few(numels: Sequence[int]) -> str:
    return ", ".join(map(str, numels[:4])) + (", …" if len(numels) > 4 else "")
