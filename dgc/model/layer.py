"""One weight tensor ↔ one record of the file: codes, levels, tables, coded streams.

A record is all that a decoder needs but for tables it takes over from an earlier record. The
bytes are described in docs/file.md.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgc.core import entropy
from dgc.core.blocks import Blocks, best_blocks, decode_blocks, encode_blocks
from dgc.core.codebook import lookup
from dgc.core.varint import varint
from dgc.errors import FileError
from dgc.model.bytes import Reader
from dgc.model.container import MAX_NUMEL
from dgc.model.gaps import best_gap_bits, gaps_of, places_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ANS, HUFFMAN = 1, 2
CODERS = {"ans": ANS, "huffman": HUFFMAN}
LITERAL, HALF, BLOCKS = 1, 2, 4
"""Flags: each kept weight is stored itself; levels are stored in 16 bits; positions by blocks."""
MAX_TABLE_OWNERS = 255
_BLOCKS_OVERHEAD = 64  # bits: two sizes and two last words in place of one
SMALL_LAYER = 10_000
"""Below this many weights a layer's table costs enough that layers try one table between them."""


@dataclass
class Layer:
    """A weight tensor as the file sees it.

    Attributes:
        codes: uint8, shaped as the weight; 0 is zero, c > 0 is `levels[c - 1]`, or with literal
            values 1 is "the next of `levels`".
        levels: the values, of the weight's dtype.
        literal: whether `levels` holds every kept weight in turn.
        half: whether levels are stored in 16 bits.
    """

    codes: Tensor
    levels: Tensor
    literal: bool = False
    half: bool = False

    def weight(self) -> Tensor:
        """The tensor, of the dtype of `levels`."""
        if self.literal:
            dense = self.levels.new_zeros(self.codes.shape)
            return dense.masked_scatter_(self.codes != 0, self.levels)  # a NaN bit for bit
        table = torch.cat([self.levels.new_zeros(1), self.levels])
        return lookup(self.codes, table)


class Coder(Protocol):
    """Tables and streams of one entropy coder."""

    def table(self, counts: list[int]) -> bytes: ...
    def cost(self, counts: list[int], table: bytes) -> float:
        """Bits for these symbols under `table`; infinite if it lacks one."""

    def encode(self, symbols: Tensor, table: bytes) -> bytes: ...
    def decode(self, code: bytes, count: int, table: bytes) -> Tensor: ...


class _Ans:
    def table(self, counts: list[int]) -> bytes:
        return entropy.round_counts(counts)

    def cost(self, counts: list[int], table: bytes) -> float:
        shares = torch.tensor(entropy.table_counts(table)).double()
        bits = (shares.sum().log2() - shares.log2()).tolist()
        return _price(counts, bits) + 32

    def encode(self, symbols: Tensor, table: bytes) -> bytes:
        return entropy.encode_ans(symbols, table)

    def decode(self, code: bytes, count: int, table: bytes) -> Tensor:
        return entropy.decode_ans(code, count, table)


class _Huffman:
    def table(self, counts: list[int]) -> bytes:
        return bytes(entropy.huffman_lengths(counts))

    def cost(self, counts: list[int], table: bytes) -> float:
        return _price(counts, [n or float("inf") for n in table])

    def encode(self, symbols: Tensor, table: bytes) -> bytes:
        return entropy.encode_huffman(symbols, list(table))

    def decode(self, code: bytes, count: int, table: bytes) -> Tensor:
        return entropy.decode_huffman(code, count, list(table))


_CODERS: dict[int, Coder] = {ANS: _Ans(), HUFFMAN: _Huffman()}


def _price(counts: list[int], bits: list[float]) -> float:
    if len(counts) > len(bits):
        return float("inf")
    return sum(c * b for c, b in zip(counts, bits, strict=False) if c)


# --- tables ------------------------------------------------------------------------------------


def _pack_table(kind: int, table: bytes) -> bytes:
    """Alphabet − 1, then a byte a symbol (ANS) or a nibble a symbol (Huffman, low nibble first)."""
    if kind == HUFFMAN:
        even = table + b"\0" * (len(table) % 2)
        body = bytes(a | b << 4 for a, b in zip(even[::2], even[1::2], strict=True))
    else:
        body = table
    return bytes([len(table) - 1]) + body


def _trim(table: bytes) -> bytes:
    return table.rstrip(b"\0") or b"\0"


def _unpack_table(kind: int, reader: Reader) -> bytes:
    size = reader.byte() + 1
    if kind == ANS:
        return reader.take(size)
    packed = reader.take((size + 1) // 2)
    table = bytes(n for b in packed for n in (b & 15, b >> 4))
    if any(table[size:]):
        raise FileError("a Huffman table has bits left over: the file is damaged")
    return table[:size]


@dataclass
class Stream:
    """Symbols of one record before coding, and the table chosen for them."""

    symbols: Tensor
    counts: list[int]
    table: bytes = b""
    reference: int = 0  # 0: own table; r: the table of the r-th record


def choose_tables(kind: int, streams: list[Stream]) -> None:
    """Give each stream of the same role, one a record, its own table or an earlier record's.

    First the small layers' counts are pooled into one table; that is kept where it saves bytes.
    """
    plain = _assign(kind, streams, None)
    small = [s.counts for s in streams if s.symbols.numel() < SMALL_LAYER]
    if len(small) < 2:
        return
    size = max(map(len, small))
    pooled = [sum(c[i] for c in small if i < len(c)) for i in range(size)]
    if _assign(kind, streams, _trim(_CODERS[kind].table(pooled))) >= plain:
        _assign(kind, streams, None)


def _assign(kind: int, streams: list[Stream], pool: bytes | None) -> float:
    """Choose each stream's table in turn; the total bits of tables and codes."""
    coder, owned, total = _CODERS[kind], dict[int, bytes](), 0.0
    for index, stream in enumerate(streams, 1):
        own = _trim(coder.table(stream.counts))
        if pool is not None and stream.symbols.numel() < SMALL_LAYER and pool not in owned.values():
            own = pool
        stream.table, stream.reference = own, 0
        best = coder.cost(stream.counts, own) + 8 * len(_pack_table(kind, own))
        for earlier, table in owned.items():
            cost = coder.cost(stream.counts, table)
            if cost < best:
                stream.table, stream.reference, best = table, earlier, cost
        if not stream.reference and index <= MAX_TABLE_OWNERS:
            owned[index] = own
        total += best
    return total


# --- records -----------------------------------------------------------------------------------


@dataclass
class _Draft:
    layer: Layer
    streams: list[Stream]
    gap_bits: int = 0
    blocks: Blocks | None = None


def encode_layers(layers: list[Layer], coder: str) -> list[bytes]:
    """The record of each layer; `coder` is `"ans"` or `"huffman"`."""
    kind = CODERS[coder]
    drafts = [_draft(layer, kind) for layer in layers]
    for role in range(kind):
        choose_tables(kind, [d.streams[role] for d in drafts])
    return [_record(draft, kind) for draft in drafts]


def _draft(layer: Layer, kind: int) -> _Draft:
    codes, alphabet = layer.codes.reshape(-1), 2 if layer.literal else layer.levels.numel() + 1
    if kind == ANS:
        found = _blocks_of(layer)
        coded = codes[codes != 0] if found else codes
        return _Draft(layer, [Stream(coded, entropy.count_symbols(coded, alphabet))], 0, found)
    gap_bits = best_gap_bits(codes)
    gaps = gaps_of(codes, gap_bits)
    values = codes[codes != 0] - 1
    if layer.literal:
        values = values[:0]
    counts = entropy.count_symbols(values, max(1, alphabet - 1))
    streams = [
        Stream(gaps, entropy.count_symbols(gaps, 2**gap_bits)),
        Stream(values, counts),
    ]
    return _Draft(layer, streams, gap_bits)


def _blocks_of(layer: Layer) -> Blocks | None:
    """How to code where `layer` is not zero by rows and columns, if that takes fewer bits."""
    if layer.codes.dim() < 2:
        return None
    kept = layer.codes.flatten(1) != 0
    if min(kept.shape) == 1:  # classes of single elements never cost fewer bits
        return None
    nonzeros = int(kept.count_nonzero())
    plain = entropy.entropy_bits([kept.numel() - nonzeros, nonzeros])
    if plain <= _BLOCKS_OVERHEAD:
        return None
    found = best_blocks(kept)
    return found if found.bits + _BLOCKS_OVERHEAD < plain else None


def _record(draft: _Draft, kind: int) -> bytes:
    layer = draft.layer
    shape, levels = layer.codes.shape, layer.levels
    flags = LITERAL * layer.literal | HALF * layer.half | BLOCKS * (draft.blocks is not None)
    out = bytes([kind | DTYPES.index(levels.dtype) << 4, flags, len(shape)])
    out += b"".join(varint(n) for n in (*shape, int(layer.codes.count_nonzero())))
    stored = levels.to(torch.float16) if layer.half else levels
    raw = stored.contiguous().view(torch.uint8).numpy().tobytes()
    if not layer.literal:
        out += varint(levels.numel()) + raw
    if kind == HUFFMAN:
        out += bytes([draft.gap_bits]) + varint(draft.streams[0].symbols.numel())
    for stream in draft.streams:
        own = b"" if stream.reference else _pack_table(kind, stream.table)
        code = _CODERS[kind].encode(stream.symbols, stream.table)
        out += bytes([stream.reference]) + own + varint(len(code)) + code
    if draft.blocks is not None:
        code = encode_blocks(layer.codes.flatten(1) != 0, draft.blocks)
        out += varint(len(code)) + code
    return out + (raw if layer.literal else b"")


@dataclass(frozen=True)
class Head:
    """The fixed part of a record: enough to bound and compare it before anything is decoded."""

    kind: int
    dtype: torch.dtype
    literal: bool
    half: bool
    blocks: bool
    shape: tuple[int, ...]
    numel: int
    nonzeros: int


def read_head(reader: Reader) -> Head:
    """Parse and check the start of a record; allocates nothing."""
    first, flags, dims = reader.byte(), reader.byte(), reader.byte()
    kind, dtype = first & 15, first >> 4
    if kind not in _CODERS or dtype >= len(DTYPES) or flags > 7 or dims > 16:
        raise FileError("a record of an unknown kind: a newer format, or the file is damaged")
    shape = tuple(reader.varint() for _ in range(dims))
    numel = 1
    for size in shape:
        numel *= size
    nonzeros = reader.varint()
    if not 0 < numel < MAX_NUMEL or nonzeros > numel:
        raise FileError(f"a record of shape {shape} with {nonzeros} weights: the file is damaged")
    literal, half, by_blocks = (bool(flags & flag) for flag in (LITERAL, HALF, BLOCKS))
    if by_blocks and (kind != ANS or dims < 2):
        raise FileError("blocks where there are no rows and columns: the file is damaged")
    if half and (literal or DTYPES[dtype].itemsize == 2):
        raise FileError("values that cannot be in 16 bits are: the file is damaged")
    return Head(kind, DTYPES[dtype], literal, half, by_blocks, shape, numel, nonzeros)


class Decoder:
    """Decodes records in file order, keeping the tables that later ones may refer to."""

    def __init__(self) -> None:
        self._tables: list[list[bytes]] = []

    def layer(self, record: bytes) -> Layer:
        """The layer of the next record; the caller has bounded its `Head.numel`.

        Raises:
            FileError: if the record is not one that `encode_layers` can give.
        """
        reader = Reader(record)
        head = read_head(reader)
        self._tables.append([])
        levels = torch.empty(0, dtype=head.dtype)
        if not head.literal:
            count = reader.varint()
            if count > 255:
                raise FileError(f"{count} levels in a record: the file is damaged")
            levels = _values(reader, count, head)
        codes = self._ans(reader, head) if head.kind == ANS else self._huffman(reader, head)
        if head.literal:
            levels = _values(reader, head.nonzeros, head)
        reader.finish()
        if not bool(levels.all()) or not (head.literal or bool(levels.isfinite().all())):
            raise FileError("a record has a level that is zero or not finite: the file is damaged")
        top = int(codes.max())
        if int(codes.count_nonzero()) != head.nonzeros or top > (
            1 if head.literal else levels.numel()
        ):
            raise FileError("a record's codes do not fit its levels: the file is damaged")
        return Layer(codes.view(head.shape), levels, head.literal, head.half)

    def _ans(self, reader: Reader, head: Head) -> Tensor:
        if not head.blocks:
            return self._stream(reader, ANS, head.numel)
        values = self._stream(reader, ANS, head.nonzeros)
        rows = head.shape[0]
        code = reader.take(reader.varint())
        kept = decode_blocks(code, rows, head.numel // rows).view(-1)
        if int(kept.count_nonzero()) != head.nonzeros:
            raise FileError("a record's positions and values disagree: the file is damaged")
        codes = torch.zeros(head.numel, dtype=torch.uint8)
        codes[kept] = values
        return codes

    def _huffman(self, reader: Reader, head: Head) -> Tensor:
        gap_bits, count = reader.byte(), reader.varint()
        if not 1 <= gap_bits <= 8:
            raise FileError(f"gaps of {gap_bits} bits: the file is damaged")
        places = places_of(self._stream(reader, HUFFMAN, count), gap_bits, head.numel)
        wanted = 0 if head.literal else head.nonzeros
        values = self._stream(reader, HUFFMAN, wanted)
        if places.numel() != head.nonzeros or bool((values == 255).any()):
            raise FileError("a record's positions and values disagree: the file is damaged")
        codes = torch.zeros(head.numel, dtype=torch.uint8)
        codes[places] = torch.ones_like(places).to(torch.uint8) if head.literal else values + 1
        return codes

    def _stream(self, reader: Reader, kind: int, count: int) -> Tensor:
        role, reference = len(self._tables[-1]), reader.byte()
        table = _unpack_table(kind, reader) if not reference else self._earlier(reference, role)
        self._tables[-1].append(b"" if reference else bytes([kind]) + table)
        if reference and table[0] != kind:
            raise FileError("a table of another coder is referred to: the file is damaged")
        code = reader.take(reader.varint())
        return _CODERS[kind].decode(code, count, table[1:] if reference else table)

    def _earlier(self, reference: int, role: int) -> bytes:
        earlier = self._tables[:-1]
        if reference > len(earlier) or role >= len(earlier[reference - 1]):
            raise FileError(f"table {reference} is not there to refer to: the file is damaged")
        table = earlier[reference - 1][role]
        if not table:
            raise FileError(f"table {reference} is itself a reference: the file is damaged")
        return table


def _values(reader: Reader, count: int, head: Head) -> Tensor:
    stored = torch.float16 if head.half else head.dtype
    raw = reader.take(count * stored.itemsize)
    if not count:
        return torch.empty(0, dtype=head.dtype)
    return torch.frombuffer(bytearray(raw), dtype=stored).to(head.dtype)
