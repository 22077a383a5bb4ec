"""What a compressed file consists of, as a table whose total is the file's size."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dgc.core import entropy
from dgc.core.blocks import best_blocks
from dgc.core.codebook import CHUNK
from dgc.model.bytes import Reader
from dgc.model.layer import Layer, read_head


@dataclass(frozen=True)
class Row:
    """One entry of the file. Bits are per kept weight, bytes are whole entries.

    `pruned_bytes` (P), `shared_bytes` (P+Q) are what the entry would take with 32-bit values,
    and with codes of fixed width, and gaps of the best fixed width, as in the paper's table;
    `file_bytes` (P+Q+coding) is what it takes. `entropy_bytes` is the entropy of its values and
    positions, of positions by blocks with what tells the blocks.
    """

    name: str
    numel: int
    density: float
    weight_bits: float
    index_bits: float
    dense_bytes: int
    pruned_bytes: int
    shared_bytes: int
    file_bytes: int
    entropy_bytes: int


@dataclass(frozen=True)
class Report:
    """What `dgc.save` wrote; `print` it.

    Attributes:
        rows: one per entry of the file.
        header_bytes: names, shapes, version and hash.
        file_bytes: size of the file: header and all rows.
        dense_bytes: the same tensors uncompressed, without any container.
    """

    rows: tuple[Row, ...]
    header_bytes: int
    file_bytes: int

    @property
    def dense_bytes(self) -> int:
        return sum(row.dense_bytes for row in self.rows)

    @property
    def compression_ratio(self) -> float:
        """Dense bytes / file bytes."""
        return self.dense_bytes / self.file_bytes

    def __str__(self) -> str:
        width = max([6, *(len(row.name) for row in self.rows)])
        lines = [
            f"{'layer':<{width}} {'weights':>10} {'density':>8} {'w bits':>6} {'i bits':>6} "
            f"{'dense B':>11} {'P':>10} {'P+Q':>10} {'file B':>10} {'ratio':>7}"
        ]
        total = [self.dense_bytes, self.header_bytes, self.header_bytes, self.file_bytes]
        for row in self.rows:
            sizes = [row.dense_bytes, row.pruned_bytes, row.shared_bytes, row.file_bytes]
            total[1] += row.pruned_bytes
            total[2] += row.shared_bytes
            lines.append(
                f"{row.name:<{width}} {row.numel:>10} {row.density:>8.2%} {row.weight_bits:>6.2f} "
                f"{row.index_bits:>6.2f} {_sizes(sizes)}"
            )
        blank = f"{'':>8} {'':>6} {'':>6}"
        head = [0, self.header_bytes, self.header_bytes, self.header_bytes]
        lines.append(f"{'header':<{width}} {'':>10} {blank} {_sizes(head)}")
        weights = sum(row.numel for row in self.rows)
        lines.append(f"{'total':<{width}} {weights:>10} {blank} {_sizes(total)}")
        return "\n".join(lines)


def _sizes(sizes: list[int]) -> str:
    ratio = f"{sizes[0] / sizes[3]:>6.1f}x" if sizes[0] and sizes[3] else f"{'':>7}"
    return f"{sizes[0]:>11} {sizes[1]:>10} {sizes[2]:>10} {sizes[3]:>10} {ratio}"


def plain_row(name: str, tensor: Tensor, file_bytes: int) -> Row:
    """The row of a tensor that is stored as it is, or in 16 bits."""
    density = float((tensor != 0).double().mean()) if tensor.numel() else 0.0
    bits = 8 * file_bytes / max(1, tensor.numel())
    dense = tensor.numel() * tensor.itemsize
    sizes = (dense, dense, file_bytes, file_bytes, file_bytes)
    return Row(name, tensor.numel(), density, bits, 0.0, *sizes)


def layer_row(name: str, layer: Layer, record: bytes) -> Row:
    """The row of a weight tensor coded as `record`."""
    numel, item = layer.codes.numel(), layer.levels.itemsize
    counts = entropy.count_symbols(layer.codes, int(layer.codes.max()) + 1)
    kept = numel - counts[0]
    value_bits = entropy.entropy_bits(counts[1:]) if not layer.literal else 8.0 * item * kept
    if read_head(Reader(record)).blocks:
        place_bits: float = best_blocks(layer.codes.flatten(1) != 0).bits
    else:
        place_bits = entropy.entropy_bits([counts[0], kept])
    width = (
        max(1, math.ceil(math.log2(layer.levels.numel() + 1))) if not layer.literal else 8 * item
    )
    book = 0 if layer.literal else layer.levels.numel() * item
    return Row(
        name,
        numel,
        kept / numel,
        value_bits / max(1, kept),
        place_bits / max(1, kept),
        numel * item,
        _fixed_bytes(layer.codes, 8 * item, counts[0]),
        _fixed_bytes(layer.codes, width, counts[0]) + book,
        len(record),
        math.ceil((value_bits + place_bits) / 8),
    )


def _fixed_bytes(codes: Tensor, width: int, zeros: int) -> int:
    """Bytes with gaps of the best fixed width, fillers included, or without gaps if that is less."""
    best = codes.numel() * width
    if zeros > codes.numel() // 20:
        flat, kept = codes.reshape(-1), codes.numel() - zeros
        fillers, last = [0] * 17, -1
        for start in range(0, flat.numel(), CHUNK):  # positions take 8 bytes each
            at = flat[start : start + CHUNK].nonzero().squeeze(1) + start
            runs = torch.diff(at, prepend=at.new_tensor([last])) - 1
            last = int(at[-1]) if at.numel() else last
            for gap_bits in range(1, 17):
                fillers[gap_bits] += int((runs // 2**gap_bits).sum())
        best = min(best, *((kept + fillers[g]) * (width + g) for g in range(1, 17)))
    return (best + 7) // 8
