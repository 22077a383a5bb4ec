"""The safetensors container of docs/file.md: named byte ranges, a version and a hash."""

import hashlib
import json
import math
import os
import secrets
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dgc.errors import ConfigError, FileError

MAX_HEADER_BYTES = 100_000_000
"""As in safetensors itself."""
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 16
MAX_NUMEL = 1 << 48
"""Shapes span less than this, dimensions of 0 counted as 1: no stride is beyond 64 bits."""
VERSION = "1"
CODED = ".dgc"
"""Ends the name of an entry that is a record of `dgc.model.layer`; other entries are plain."""

_START = b'{"__metadata__":{"dgc":"' + VERSION.encode() + b'","hash":"'
_HASH_CHARS = 32
_HASH_AT = 8 + len(_START)

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Entry(NamedTuple):
    """One tensor of the container: bytes with a dtype's name and a shape."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def pack(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The file: header, then the entries' bytes, widest dtype first so that all are aligned."""
    order = sorted(entries, key=lambda name: -DTYPES[entries[name].dtype].itemsize)
    meta = {"dgc": VERSION, "hash": "0" * _HASH_CHARS, **metadata}
    header: dict[str, Any] = {"__metadata__": meta}
    at = 0
    for name in order:
        dtype, shape, data = entries[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start, parts = len(text).to_bytes(8, "little") + text, [entries[n].data for n in order]
    digest = _digest(start, *parts)
    return b"".join([start[:_HASH_AT], digest, start[_HASH_AT + _HASH_CHARS :], *parts])


def _digest(start: bytes, *rest: bytes) -> bytes:
    """BLAKE2b-128, in hex, of the whole file, given in parts, but the hash itself."""
    hasher = hashlib.blake2b(start[:_HASH_AT], digest_size=_HASH_CHARS // 2)
    hasher.update(memoryview(start)[_HASH_AT + _HASH_CHARS :])
    for part in rest:
        hasher.update(part)
    return hasher.hexdigest().encode()


def unpack(raw: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a file, checked: its hash, names, types, sizes and layout.

    Raises:
        FileError: if `raw` is not exactly a file that `pack` can write.
    """
    size = int.from_bytes(raw[:8], "little")
    if not raw.startswith(_START, 8):
        raise FileError("not a compressed model of this version: it does not start as one")
    if size > min(MAX_HEADER_BYTES, len(raw) - 8) or size < len(_START) + _HASH_CHARS:
        raise FileError(f"a header of {size} bytes in a file of {len(raw)}: it is cut short")
    if raw[_HASH_AT : _HASH_AT + _HASH_CHARS] != _digest(raw):
        raise FileError("the hash does not match: the file is damaged or was changed")
    text = raw[8 : 8 + size].rstrip(b" ")
    if size - len(text) > 7 or not text.endswith(b"}"):
        raise FileError("the header is not padded with spaces: another program wrote the file")
    header = read_json(text, "header")
    assert isinstance(header, dict)  # it starts with `{`
    metadata = header.pop("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError("metadata are not strings: the file is damaged")
    if len(header) > MAX_TENSORS:
        raise FileError(f"{len(header)} tensors: at most {MAX_TENSORS}")
    entries, at = {}, 0
    for name, fields in header.items():
        entries[name], at = _entry(name, fields, raw, 8 + size, at)
    widths = [DTYPES[entry.dtype].itemsize for entry in entries.values()]
    if size % 8 or widths != sorted(widths, reverse=True):
        raise FileError("the tensors are not aligned: another program wrote the file")
    if 8 + size + at != len(raw):
        raise FileError("the tensors do not fill the file: it is damaged")
    return entries, metadata


def read_json(text: str | bytes, what: str) -> Any:
    """`json.loads`; a `FileError` that speaks of `what` if a name occurs twice or is no Unicode."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key.encode() for key, _ in pairs}) != len(pairs):
            raise FileError(f"a name occurs twice in the {what}: the file is damaged")
        return dict(pairs)

    try:
        # Of bytes json.loads would take lone surrogates.
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FileError(f"the {what} is not JSON ({error}): the file is damaged") from error


def _entry(name: str, fields: Any, raw: bytes, base: int, at: int) -> tuple[Entry, int]:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"the header entry of {name!r} is malformed: the file is damaged")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(f"{name!r} has the unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise FileError(f"the shape or offsets of {name!r} are malformed: the file is damaged")
    if len(shape) > MAX_DIMENSIONS:
        raise FileError(f"{name!r} has {len(shape)} dimensions: at most {MAX_DIMENSIONS}")
    if span(shape) >= MAX_NUMEL:
        raise FileError(f"{name!r} has the shape {shape}: too large for any memory")
    end = at + math.prod(shape) * DTYPES[dtype].itemsize
    if offsets != [at, end] or base + end > len(raw):
        raise FileError(f"{name!r} does not lie where its shape says: the file is damaged")
    is_record = dtype == "U8" and len(shape) == 1 and name != "__metadata__" + CODED
    if name.endswith(CODED) and not is_record:
        raise FileError(f"{name!r} is no record: the file is damaged")
    data = raw[base + at : base + end]
    if dtype == "BOOL" and data.translate(None, b"\0\1"):
        raise FileError(f"{name!r} has a truth value beside 0 and 1: the file is damaged")
    return Entry(dtype, tuple(shape), data), end


def span(shape: Sequence[int]) -> int:
    """The product of `shape` with 0 counted as 1."""
    return math.prod(max(n, 1) for n in shape)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def check_target(path: str | Path) -> None:
    """Refuse a `path` that no file can be written to; called before the work is done."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder: give the path of a file to write")
    if not (Path(path).exists() or target.parent.is_dir()):
        raise ConfigError(f"{str(path)!r} lies in no folder: make {str(target.parent)!r} first")


def write_file(path: str | Path, data: bytes) -> None:
    """Write a sibling, flush it to disk and rename it: `path` is the old file or the whole new.

    Links are followed and the mode of an old file is kept. What exists and is no regular file, such
    as a device or a pipe, is written to as it is.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is None or stat.S_ISREG(mode):
        _replace(Path(os.path.realpath(path)), data, mode)
    else:
        Path(path).write_bytes(data)


def _replace(path: Path, data: bytes, mode: int | None) -> None:
    sibling = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(sibling, "xb") as file:
            if mode is not None:
                os.chmod(sibling, stat.S_IMODE(mode))  # before there is anything to read
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
