"""Positions of non-zero codes as gaps, as in the paper; Huffman codes them."""

import torch
from torch import Tensor

from dgc.core import entropy
from dgc.errors import FileError


def gaps_of(codes: Tensor, gap_bits: int) -> Tensor:
    """Zeros before each non-zero code, uint8; 2^gap_bits − 1 stands for that many zeros alone.

    Zeros after the last non-zero code are not written.

    Example:
        >>> gaps_of(torch.tensor([0, 7, 0, 0, 0, 0, 9, 0]), gap_bits=2).tolist()
        [1, 3, 1]

    Source: arXiv 1510.00149, figure 2, where a filler also costs a value.
    """
    at = codes.reshape(-1).nonzero().squeeze(1)
    runs = torch.diff(at, prepend=at.new_tensor([-1])) - 1
    filler = 2**gap_bits - 1
    fillers = runs // filler
    gaps = torch.full((int(fillers.sum()) + runs.numel(),), filler, dtype=torch.uint8)
    gaps[(fillers + 1).cumsum(0) - 1] = (runs % filler).to(torch.uint8)
    return gaps


def places_of(gaps: Tensor, gap_bits: int, numel: int) -> Tensor:
    """Indices of the non-zero codes, int64 ascending.

    Raises:
        FileError: if one lies beyond `numel`, a gap is above 2^gap_bits − 1, or zeros come last.

    Example:
        >>> places_of(torch.tensor([1, 3, 1], dtype=torch.uint8), 2, 8).tolist()
        [1, 6]
    """
    filler = 2**gap_bits - 1
    real = gaps != filler
    places = (gaps.long() + real).cumsum(0) - 1
    if gaps.numel() and (int(gaps.max()) > filler or int(places[-1]) >= numel):
        raise FileError("a weight's position lies outside its tensor: the file is damaged")
    if gaps.numel() and not real[-1]:
        raise FileError("zeros are written after the last weight: the file is damaged")
    kept: Tensor = places[real]
    return kept


def best_gap_bits(codes: Tensor) -> int:
    def cost(gap_bits: int) -> float:
        counts = entropy.count_symbols(gaps_of(codes, gap_bits), 2**gap_bits)
        lengths = entropy.huffman_lengths(counts)
        return sum(c * b for c, b in zip(counts, lengths, strict=True)) + 4 * len(counts)

    return min(range(2, 9), key=cost)
