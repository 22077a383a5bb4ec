"""Which elements of a matrix are not zero ↔ bytes, by classes of its rows and columns.

Pruned layers have rows and columns that keep much and others that keep little or nothing. A
position costs fewer bits where that is known: each row and each column gets a class, and each pair
of classes, a *block*, its own share of non-zeros. Classes and shares are part of the code.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dgc.core import entropy
from dgc.core.codebook import nearest
from dgc.errors import FileError

RATIOS = (1.5, 2.0, 4.0, 8.0)
"""Rows (columns) are of one class between two powers of one of these; the cheapest is taken."""
MAX_CLASSES = 16

_CHUNK = 1 << 20
_Array = npt.NDArray[np.int64]
_Classes = npt.NDArray[np.uint8]
_Part = tuple[Tensor, Tensor, float]


def _shares() -> npt.NDArray[np.float64]:
    small = [(8 + b % 8) * 2.0 ** (b // 8 - 20) for b in range(128)]
    return np.array(small + [1 - x for x in reversed(small)])


SHARES = _shares()
"""What a block's byte b stands for: exact in float64, from 2^-17 to 1 − 2^-17."""


class Blocks:
    """Classes of the rows and columns of bool `kept` `[rows, columns]`, and their blocks' counts.

    Attributes:
        rows: class of each row, uint8.
        columns: class of each column, uint8.
        counts: non-zeros of each block, int64 `[row classes, column classes]`.
        elements: all elements of each block, likewise.
        bits: length of the code, tables included, but for the coder's last word.
    """

    def __init__(self, kept: Tensor, ratio: float) -> None:
        array = kept.numpy()  # whose sums make no wider copy
        self.rows = _classes(array.sum(1), ratio)
        self.columns = _classes(array.sum(0), ratio)
        self.counts = np.array([self._row_of_blocks(array, a) for a in range(self.rows.max() + 1)])
        sizes = [np.bincount(classes) for classes in (self.rows, self.columns)]
        self.elements = np.outer(*sizes)
        pairs = zip(self.counts.reshape(-1), self.elements.reshape(-1), strict=True)
        self.bits = 8.0 * (1 + sum(map(len, sizes)) + self.counts.size)
        self.bits += sum(entropy.entropy_bits([int(n) for n in size]) for size in sizes)
        self.bits += sum(entropy.entropy_bits([int(k), int(n - k)]) for k, n in pairs)

    def _row_of_blocks(self, array: npt.NDArray[np.bool_], row_class: int) -> list[int]:
        """Non-zeros of the blocks of one class of rows."""
        sums = array[self.rows == row_class].sum(0)
        return [int(sums[self.columns == b].sum()) for b in range(self.columns.max() + 1)]


def _classes(counts: _Array, ratio: float) -> _Classes:
    """Class of each count: 0, then up to the first power of `ratio` above 1, and so on."""
    edges, edge = [1], 1.0
    while edge <= int(counts.max()):
        edge *= ratio
        edges.append(int(edge) + 1)
    found = np.empty(counts.size, dtype=np.uint16)
    used = np.zeros(len(edges) + 1, dtype=np.bool_)
    for start in range(0, counts.size, _CHUNK):  # places among edges take 8 bytes each
        at = np.searchsorted(np.array(edges), counts[start : start + _CHUNK], side="right")
        found[start : start + _CHUNK] = at
        used[at] = True
    number = used.cumsum() - 1
    number = np.maximum(number - max(0, int(number[-1]) + 1 - MAX_CLASSES), 0)
    classes: _Classes = number.astype(np.uint8)[found]
    return classes


def best_blocks(kept: Tensor) -> Blocks:
    """The blocks of bool `kept` `[rows, columns]`, on the CPU, that cost the fewest bits."""
    return min((Blocks(kept, ratio) for ratio in RATIOS), key=lambda blocks: blocks.bits)


def encode_blocks(kept: Tensor, blocks: Blocks) -> bytes:
    """Code of `kept`: classes, tables, shares, and one ANS code of classes and elements.

    Args:
        kept: bool `[rows, columns]`, on the CPU, at least one element.
        blocks: made of `kept`.

    Example:
        >>> kept = torch.zeros(64, 64, dtype=torch.bool)
        >>> kept[3], kept[:, 5] = True, True
        >>> code = encode_blocks(kept, best_blocks(kept))
        >>> len(code) < 64 * 64 / 8 / 10, torch.equal(decode_blocks(code, 64, 64), kept)
        (True, True)
    """
    sides = (blocks.rows, blocks.columns)
    tables = [entropy.round_counts([int(n) for n in np.bincount(side)]) for side in sides]
    shares = torch.from_numpy(blocks.counts / blocks.elements)
    codes = nearest(shares, torch.from_numpy(SHARES)).numpy()
    coder = entropy.ans_coder()
    for rows, columns, share in reversed(_parts(*sides, codes)):
        part = kept[rows][:, columns].to(torch.int32).reshape(-1)
        coder.encode_reverse(part.numpy(), _bernoulli(share))
    for side, table in zip(reversed(sides), reversed(tables), strict=True):
        entropy.push_ans(coder, torch.from_numpy(side), table)
    head = bytes([len(tables[0]) - 1 | len(tables[1]) - 1 << 4])
    return head + b"".join(tables) + codes.tobytes() + entropy.ans_bytes(coder)


def decode_blocks(code: bytes, rows: int, columns: int) -> Tensor:
    """The bool `[rows, columns]` that `encode_blocks` wrote; the caller bounds the product.

    Raises:
        FileError: if `code` is not what `encode_blocks` gives for such a matrix.
    """
    if not code:
        raise FileError("positions without bytes: the file is damaged")
    sizes = (code[0] & 15) + 1, (code[0] >> 4) + 1
    first, second = 1 + sizes[0], 1 + sum(sizes)
    start = second + sizes[0] * sizes[1]
    if start > len(code):
        raise FileError("positions end within their tables: the file is damaged")
    coder = entropy.ans_coder(code[start:])
    of_rows = entropy.pop_ans(coder, rows, code[1:first]).numpy()
    of_columns = entropy.pop_ans(coder, columns, code[first:second]).numpy()
    codes = np.frombuffer(code[second:start], dtype=np.uint8).reshape(sizes)
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    for rows_, columns_, share in _parts(of_rows, of_columns, codes):
        shape = rows_.numel(), columns_.numel()
        part = coder.decode(_bernoulli(share), shape[0] * shape[1])
        kept[rows_[:, None], columns_] = torch.from_numpy(part).bool().view(shape)
    entropy.finish_ans(coder)
    return kept


def _parts(of_rows: _Classes, of_columns: _Classes, codes: npt.NDArray[np.uint8]) -> list[_Part]:
    """Rows, columns and share of each block in turn, in parts of some `_CHUNK` elements."""
    parts: list[_Part] = []
    for a in range(codes.shape[0]):
        rows = torch.from_numpy(np.flatnonzero(of_rows == a))
        for b in range(codes.shape[1]):
            columns = torch.from_numpy(np.flatnonzero(of_columns == b))
            if rows.numel() and columns.numel():
                for some in rows.split(max(1, _CHUNK // columns.numel())):
                    parts.append((some, columns, float(SHARES[codes[a, b]])))
    return parts


def _bernoulli(share: float) -> object:
    import constriction

    # perfect=False is the documented, simple rounding to 24 bits: the same on both sides.
    return constriction.stream.model.Bernoulli(share, perfect=False)
