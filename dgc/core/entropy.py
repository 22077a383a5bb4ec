"""Integer symbols ↔ bytes: canonical Huffman, and ANS through constriction.

A *table* says how frequent each symbol of an alphabet is; a coder needs nothing else. Tables are
small (one byte a symbol for ANS, four bits for Huffman) because in a file of ten kilobytes they
count. Every decoder is total: any bytes give the symbols or `FileError`.
"""

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dgc.errors import FileError

MAX_CODE_BITS = 15
"""Longest Huffman code, so that a length fits four bits and a decoding table 2^15 entries."""

_CHUNK = 1 << 20
_CHUNK_BYTES = 1 << 17  # Huffman decoding looks at this many bytes at a time

Array = npt.NDArray[Any]


def count_symbols(symbols: Tensor, alphabet: int) -> list[int]:
    """How often each of `alphabet` symbols occurs in integer `symbols` (any shape).

    Example:
        >>> count_symbols(torch.tensor([0, 2, 2]), 4)
        [1, 0, 2, 0]
    """
    counts = torch.zeros(alphabet, dtype=torch.int64)
    for part in symbols.reshape(-1).split(_CHUNK):  # bincount makes an int64 copy
        counts += torch.bincount(part.int(), minlength=alphabet).cpu()
    return [int(c) for c in counts]


def entropy_bits(counts: list[int]) -> float:
    """Σ counts · log2(total / counts): no coder with one fixed table needs fewer bits.

    Example:
        >>> entropy_bits([4, 4, 0]), entropy_bits([7])
        (8.0, 0.0)
    """
    used = np.array([c for c in counts if c > 0], dtype=np.float64)
    return max(0.0, float((used * np.log2(used.sum() / used)).sum())) if len(used) else 0.0


# --- ANS ---------------------------------------------------------------------------------------


def round_counts(counts: list[int]) -> bytes:
    """Counts as one byte each: eight exponents of two an octave apart, three bits of mantissa.

    `0..7` stand for themselves and `8·e + m` for `(8 + m)·2^(e-1)`; a count is rounded to the
    nearest, a positive one never to zero. The relative error is at most 1/16, which costs well
    under 0.1 % in code length.

    Raises:
        ValueError: if a count is negative or above `15·2^30`.

    Example:
        >>> list(round_counts([0, 5, 100, 1]))
        [0, 5, 37, 1]
        >>> table_counts(bytes([0, 5, 37, 1]))
        [0, 5, 104, 1]
    """
    levels = np.array(table_counts(bytes(range(256))))
    array = np.array(counts, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() > levels[-1]):
        raise ValueError(f"counts from {array.min()} to {array.max()}: at most {levels[-1]}")
    above = np.searchsorted(levels, array)
    below = np.maximum(above - 1, 0)
    nearest = np.where(array - levels[below] < levels[above] - array, below, above)
    return bytes(np.where(array > 0, np.maximum(nearest, 1), 0).astype(np.uint8))


def table_counts(table: bytes) -> list[int]:
    """What `round_counts` wrote, as counts."""
    return [b if b < 8 else (8 + b % 8) << (b // 8 - 1) for b in table]


def encode_ans(symbols: Tensor, table: bytes) -> bytes:
    """ANS code of integer `symbols` under `table`, little-endian 32-bit words.

    A symbol of count c costs about log2(total / c) bits, fractions included.

    Args:
        symbols: integers in `[0, len(table))`, any shape.
        table: from `round_counts`, at least one positive.

    Raises:
        ValueError: if a symbol is outside the table or has count zero there.

    Example:
        >>> table = round_counts([6, 1, 1])
        >>> code = encode_ans(torch.tensor([0, 0, 2, 0, 0, 1, 0, 0]), table)
        >>> len(code), decode_ans(code, 8, table).tolist()
        (4, [0, 0, 2, 0, 0, 1, 0, 0])

    Source: Duda, arXiv 1311.2540; the coder is Bamler's constriction, arXiv 2201.01741.
    """
    coder = ans_coder()
    push_ans(coder, symbols, table)
    return ans_bytes(coder)


def decode_ans(code: bytes, count: int, table: bytes) -> Tensor:
    """The `count` symbols, uint8 `[count]`, that `encode_ans` wrote under the same `table`.

    The caller bounds `count`. At most 256 symbols in the alphabet.

    Raises:
        FileError: if `code` is not what `encode_ans` gives for some `count` symbols.
    """
    coder = ans_coder(code)
    symbols = pop_ans(coder, count, table)
    finish_ans(coder)
    return symbols


def ans_coder(code: bytes = b"") -> Any:
    """A stack of what was encoded, empty or from `ans_bytes`; `FileError` if it cannot be that."""
    import constriction

    if len(code) % 4:
        raise FileError("ANS code of an impossible size: the file is damaged")
    if not code:
        return constriction.stream.stack.AnsCoder()
    words = np.frombuffer(code, dtype="<u4").astype(np.uint32)
    try:
        return constriction.stream.stack.AnsCoder(words)
    except ValueError as error:
        raise FileError(f"ANS code does not decode ({error}): the file is damaged") from error


def ans_bytes(coder: Any) -> bytes:
    """All that is on the stack, little-endian 32-bit words."""
    words: Array = coder.get_compressed()
    return words.astype("<u4", copy=False).tobytes()


def finish_ans(coder: Any) -> None:
    """Nothing may be left on the stack."""
    if not coder.is_empty():
        raise FileError("ANS code has bits left over: the file is damaged")


def push_ans(coder: Any, symbols: Tensor, table: bytes) -> None:
    """Put `symbols` on the stack, the first on top; arguments as for `encode_ans`."""
    flat = symbols.reshape(-1)
    if flat.numel() == 0:
        return
    lacking = [s for s, b in enumerate(table) if b == 0]
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high >= len(table) or any((flat == s).any() for s in lacking):
        raise ValueError("a symbol has no count in the table: count the symbols that are encoded")
    if sum(b > 0 for b in table) > 1:
        model = _ans_model(table)
        for part in reversed(flat.split(_CHUNK)):  # a stack: the first symbol goes on last
            coder.encode_reverse(part.to("cpu", torch.int32).numpy(), model)


def pop_ans(coder: Any, count: int, table: bytes) -> Tensor:
    """Take `count` symbols from the stack, uint8; as `decode_ans`, but more may be left."""
    used = [s for s, b in enumerate(table) if b > 0]
    if not used or len(table) > 256:
        raise FileError("ANS table of an impossible size: the file is damaged")
    if count == 0 or len(used) == 1:
        return torch.full((count,), used[0], dtype=torch.uint8)
    symbols: Array = coder.decode(_ans_model(table), count)
    if any((symbols == s).any() for s, b in enumerate(table) if b == 0):
        raise FileError("ANS code holds a symbol of count zero: the file is damaged")
    return torch.from_numpy(symbols.astype(np.uint8))


def _ans_model(table: bytes) -> Any:
    import constriction

    # Four significant bits each, so exact in float32. perfect=False is the documented, simple
    # rounding to 24 bits; it must be the same on both sides, so it is never left to a default.
    return constriction.stream.model.Categorical(
        np.array(table_counts(table), dtype=np.float32), perfect=False
    )


# --- Huffman -----------------------------------------------------------------------------------


def huffman_lengths(counts: list[int]) -> list[int]:
    """Code length in bits of each symbol, 0 where the count is 0, at most `MAX_CODE_BITS`.

    Optimal unless the limit binds; then counts are flattened until it holds. A single symbol gets
    one bit. Kraft's sum is exactly 1 for two symbols or more.

    Example:
        >>> huffman_lengths([8, 3, 2, 0, 1])
        [1, 2, 3, 0, 3]

    Source: Huffman, Proc. IRE 1952.
    """
    used = [s for s, c in enumerate(counts) if c > 0]
    lengths = [0] * len(counts)
    if len(used) == 1:
        lengths[used[0]] = 1
    if len(used) < 2:
        return lengths
    weights = {s: counts[s] for s in used}
    while True:
        depth = _tree_depths(weights)
        if max(depth.values()) <= MAX_CODE_BITS:
            break
        weights = {s: w // 2 + 1 for s, w in weights.items()}
    for symbol, length in depth.items():
        lengths[symbol] = length
    return lengths


def _tree_depths(weights: dict[int, int]) -> dict[int, int]:
    heap = [(weight, symbol, [symbol]) for symbol, weight in weights.items()]
    heapq.heapify(heap)
    depth = dict.fromkeys(weights, 0)
    while len(heap) > 1:
        (w0, first, left), (w1, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            depth[symbol] += 1
        heapq.heappush(heap, (w0 + w1, first, left + right))
    return depth


def _canonical_codes(lengths: list[int]) -> dict[int, int]:
    """Codes counted upwards in order of (length, symbol), as in RFC 1951."""
    codes, code, previous = {}, 0, 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        code <<= length - previous
        codes[symbol], previous = code, length
        code += 1
    return codes


def encode_huffman(symbols: Tensor, lengths: list[int]) -> bytes:
    """Canonical Huffman code of integer `symbols`, most significant bit first, zero-padded.

    Args:
        symbols: integers in `[0, len(lengths))`, any shape.
        lengths: from `huffman_lengths`.

    Raises:
        ValueError: if a symbol is outside the alphabet or has no code.

    Example:
        >>> code = encode_huffman(torch.tensor([0, 1, 4, 0]), [1, 2, 3, 0, 3])
        >>> f"{int.from_bytes(code, 'big'):08b}"
        '01011100'
        >>> decode_huffman(code, 4, [1, 2, 3, 0, 3]).tolist()
        [0, 1, 4, 0]
    """
    array = symbols.reshape(-1).to("cpu", torch.int64).numpy()
    if array.size == 0:
        return b""
    size = np.array(lengths, dtype=np.int64)
    if array.min() < 0 or array.max() >= len(lengths) or size[array].min() == 0:
        raise ValueError("a symbol has no Huffman code: count the symbols that are encoded")
    code = np.zeros(len(lengths), dtype=np.int64)
    for symbol, value in _canonical_codes(lengths).items():
        code[symbol] = value << (MAX_CODE_BITS - lengths[symbol])
    bits = []
    for start in range(0, array.size, _CHUNK_BYTES):
        part = array[start : start + _CHUNK_BYTES]
        shifts = np.arange(MAX_CODE_BITS - 1, -1, -1)
        wide = (code[part][:, None] >> shifts & 1).astype(np.uint8)
        bits.append(wide[np.arange(MAX_CODE_BITS) < size[part][:, None]])
    return np.packbits(np.concatenate(bits)).tobytes()


def decode_huffman(code: bytes, count: int, lengths: list[int]) -> Tensor:
    """The `count` symbols, uint8 `[count]`, that `encode_huffman` wrote with the same `lengths`.

    The caller need not bound `count`: a symbol takes at least one bit of `code`.

    Raises:
        FileError: if `lengths` is no Huffman code or `code` does not end with symbol `count`.
    """
    _check_lengths(lengths)
    if count > 8 * len(code) or (count == 0 and code):
        raise FileError(f"{len(code)} bytes of Huffman code for {count} symbols: damaged file")
    symbol_of, length_of = _decoding_table(lengths)
    out, position = np.empty(count, dtype=np.uint8), 0
    padded = np.frombuffer(code + b"\0\0\0", dtype=np.uint8)
    done = 0
    while done < count:
        if position >= 8 * len(code):
            raise FileError(f"Huffman code ends after {done} of {count} symbols: damaged file")
        first = position // 8
        windows = _windows(padded[first : first + _CHUNK_BYTES + 2])
        steps = length_of[windows].tolist()
        seen: list[int] = []
        at, end, room = position - 8 * first, len(steps), count - done
        while at < end and len(seen) < room:
            if not steps[at]:
                raise FileError("Huffman code matches no symbol: the file is damaged")
            seen.append(at)
            at += steps[at]
        out[done : done + len(seen)] = symbol_of[windows[seen]]
        done, position = done + len(seen), 8 * first + at
    if (position + 7) // 8 != len(code) or (position % 8 and code[-1] & (0xFF >> position % 8)):
        raise FileError("Huffman code has bits left over: the file is damaged")
    return torch.from_numpy(out)


def _windows(data: Array) -> Array:
    """The `MAX_CODE_BITS` bits that start at each bit of `data` but its last two bytes, int32."""
    wide = data.astype(np.int32)
    words = wide[:-2] << 16 | wide[1:-1] << 8 | wide[2:]
    windows: Array = words[:, None] >> np.arange(24 - MAX_CODE_BITS, 16 - MAX_CODE_BITS, -1)
    return windows.reshape(-1) & ((1 << MAX_CODE_BITS) - 1)


def _check_lengths(lengths: list[int]) -> None:
    used = [n for n in lengths if n]
    if len(lengths) > 256 or any(not 0 <= n <= MAX_CODE_BITS for n in lengths):
        raise FileError("Huffman table of an impossible size: the file is damaged")
    kraft = sum(1 << (MAX_CODE_BITS - n) for n in used)
    if kraft != 1 << MAX_CODE_BITS and used not in ([], [1]):
        raise FileError("Huffman table is not a complete prefix code: the file is damaged")


def _decoding_table(lengths: list[int]) -> tuple[Array, Array]:
    """Symbol and code length for each window of `MAX_CODE_BITS` bits; length 0: no code."""
    symbol_of = np.zeros(1 << MAX_CODE_BITS, dtype=np.uint8)
    length_of = np.zeros(1 << MAX_CODE_BITS, dtype=np.uint8)
    for symbol, code in _canonical_codes(lengths).items():
        shift = MAX_CODE_BITS - lengths[symbol]
        symbol_of[code << shift : (code + 1) << shift] = symbol
        length_of[code << shift : (code + 1) << shift] = lengths[symbol]
    return symbol_of, length_of
