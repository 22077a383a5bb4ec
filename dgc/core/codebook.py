"""Values ↔ codes of a small codebook: exact 1-D k-means, other starts, entropy-penalised codes.

Zero is not in a codebook: it is the value of the weights that were pruned and stays exactly zero.
"""

import numpy as np
import torch
from torch import Tensor

from dgc.core.entropy import count_symbols
from dgc.errors import ConfigError

EXACT_WORK = 1 << 22
"""k-means is exact where distinct values × levels is at most this, a fraction of a second; above it levels
are optimal for `COARSE_RUNS` runs of the sorted values, then improved on `FINE_RUNS` of them."""
COARSE_RUNS = 1 << 12
FINE_RUNS = 1 << 18
CHUNK = 1 << 20
"""Large tensors are handled this many elements at a time, to bound the memory for temporaries."""


def kmeans_levels(values: Tensor, k: int) -> Tensor:
    """At most `k` levels, float64 ascending, that minimise Σ (value − nearest level)².

    Globally optimal, by dynamic programming over the sorted values, up to `EXACT_WORK`.

    Args:
        values: floating point, any shape, at least one; float64 is handled as such, anything else
            in 32 bits.
        k: at least 1.

    Example:
        >>> kmeans_levels(torch.tensor([0.9, 5.0, 1.1, 5.0, -2.0]), 3).tolist()
        [-2.0, 1.0, 5.0]

    Source: Wu, *Optimal Quantization by Matrix Searching*, J. Algorithms 1991.
    """
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    flat = values.detach().reshape(-1).to("cpu", wide)
    ordered = torch.from_numpy(np.sort(flat.numpy()))
    new = torch.ones(ordered.numel(), dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=new[1:])
    if np.count_nonzero(new.numpy()) * k <= EXACT_WORK:  # equal values are one that counts for many
        at = new.nonzero().squeeze(1)
        counts = torch.diff(at, append=at.new_tensor([ordered.numel()])).double()
        distinct = ordered[at].double()
        return distinct if distinct.numel() <= k else _solve(distinct, counts, k)
    fine = _runs(ordered, FINE_RUNS)
    del ordered, new  # of the size of `values`
    coarse = _coarser(*fine, COARSE_RUNS)
    return lloyd(fine[0], _solve(*coarse, min(k, coarse[0].numel())), fine[1])


def _coarser(values: Tensor, counts: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Means and counts of about `runs` runs: half of the cuts by counts, half as dense as levels will be.

    Source: Panter, Dite, Proc. IRE 1951: of a density f the optimal levels lie as f^(1/3) does.
    """
    gaps = values.diff()
    gaps = torch.cat([gaps[:1], (gaps[1:] + gaps[:-1]) / 2, gaps[-1:]])
    wanted = counts ** (1 / 3) * (gaps / gaps.max()) ** (2 / 3)
    place = (wanted.cumsum(0) / wanted.sum() + counts.cumsum(0) / counts.sum()) / 2
    run = (place * runs).long().unique_consecutive(return_inverse=True)[1]
    numbers = counts.new_zeros(int(run[-1]) + 1).index_add_(0, run, counts)
    return torch.zeros_like(numbers).index_add_(0, run, values * counts) / numbers, numbers


def _runs(ordered: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Means of about `runs` runs of sorted values, and how many values each is of; float64.

    An eighth of them are single values at either end: outliers count in full.

    Example:
        >>> _runs(torch.arange(14.0), 8)[1].tolist()
        [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]
    """
    end = min(runs // 8, ordered.numel() // 2)
    inner = ordered[end : ordered.numel() - end]
    length = max(1, inner.numel() // (runs - 2 * end))
    whole = inner.numel() // length * length
    rows = inner[:whole].view(-1, length).split(max(1, CHUNK // length))
    means = torch.cat([row.double().mean(1) for row in rows])  # sums in 32 bits may overflow
    parts = ordered[:end], means, inner[whole:], ordered[ordered.numel() - end :]
    values = torch.cat([part.double() for part in parts])
    counts = torch.ones_like(values)
    counts[end : end + means.numel()] = length
    return values, counts


def _solve(ordered: Tensor, counts: Tensor, k: int) -> Tensor:
    from dgc.core.kmeans import optimal_means  # numba takes a while to load

    levels: Tensor = torch.from_numpy(optimal_means(ordered.numpy(), counts.numpy(), k)).unique()
    return levels


def linear_levels(values: Tensor, k: int) -> Tensor:
    """`k` levels spaced evenly from the least to the largest value, float64.

    Example:
        >>> linear_levels(torch.tensor([-1.0, 0.3, 3.0]), 3).tolist()
        [-1.0, 1.0, 3.0]
    """
    low, high = values.detach().aminmax()
    return torch.linspace(float(low), float(high), k, dtype=torch.float64)


def density_levels(values: Tensor, k: int) -> Tensor:
    """`k` levels with as many values around each: the quantiles (i + ½) / k, float64.

    Example:
        >>> density_levels(torch.arange(100.0), 2).tolist()
        [25.0, 75.0]
    """
    ordered = values.detach().reshape(-1).double().cpu().sort().values
    at = (torch.arange(k) + 0.5) / k * ordered.numel()
    return ordered[at.long().clamp(max=ordered.numel() - 1)]


def random_levels(values: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """`k` of the values drawn without replacement (fewer if there are fewer), float64 ascending.

    Example:
        >>> random_levels(torch.tensor([2.0, 1.0]), 5).tolist()
        [1.0, 2.0]
    """
    flat = values.detach().reshape(-1).double().cpu()
    return flat[torch.randperm(flat.numel(), generator=generator)[:k]].sort().values


def lloyd(
    values: Tensor, levels: Tensor, counts: Tensor | None = None, iterations: int = 100
) -> Tensor:
    """Move each level to the mean of the values nearest to it, until nothing changes.

    Args:
        values: floating point, any shape; with `counts` ascending float64 `[n]`.
        levels: ascending.
        counts: float64 `[n]`, how many each value stands for; 1 by default.

    Example:
        >>> lloyd(torch.tensor([0.0, 1.0, 9.0]), torch.tensor([0.0, 5.0])).tolist()
        [0.5, 9.0]
    """
    ordered = values.detach().reshape(-1).double().cpu()
    if counts is None:
        ordered = ordered.sort().values
        counts = torch.ones_like(ordered)
    sums = torch.cat([ordered.new_zeros(1), (ordered * counts).cumsum(0)])
    numbers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    levels = levels.double()
    for _ in range(iterations):
        # A level's members are a run of the sorted values, so their sum is one difference.
        cuts = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([cuts.new_zeros(1), cuts, cuts.new_tensor([ordered.numel()])])
        members = numbers[edges].diff()
        moved = torch.where(members > 0, sums[edges].diff() / members.clamp(min=1), levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def _means(values: Tensor, codes: Tensor, levels: Tensor) -> Tensor:
    """The mean of the values with each code; a level that has none stays."""
    sums, counts = torch.zeros_like(levels), torch.zeros_like(levels)
    for part, code in zip(values.split(CHUNK), codes.split(CHUNK), strict=True):
        sums.index_add_(0, code.int(), part.double())
        counts += torch.bincount(code.int(), minlength=levels.numel())
    return torch.where(counts > 0, sums / counts.clamp(min=1), levels)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each value, uint8, shaped as `values`.

    Args:
        levels: ascending, at most 256.

    Example:
        >>> nearest(torch.tensor([0.2, -3.0, 0.9]), torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [1, 0, 2]
    """
    return _cut(values, (levels[1:] + levels[:-1]) / 2, torch.arange(levels.numel()))


def places(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the level equal to each value, uint8, shaped as `values`.

    Args:
        values: each one of the levels.
        levels: ascending, at most 256.

    Example:
        >>> places(torch.tensor([0.5, -3.0]), torch.tensor([-3.0, 0.0, 0.5])).tolist()
        [2, 0]
    """
    return _cut(values, levels.double(), torch.arange(levels.numel()))


def _cut(values: Tensor, thresholds: Tensor, labels: Tensor) -> Tensor:
    """`labels[j]` where threshold j − 1 < value ≤ threshold j; a little memory at a time."""
    flat = values.detach().reshape(-1)
    thresholds, labels = thresholds.to(values.device), labels.to(values.device, torch.uint8)
    out = torch.empty(flat.numel(), dtype=torch.uint8, device=values.device)
    for part, into in zip(flat.split(CHUNK), out.split(CHUNK), strict=True):
        into.copy_(labels[torch.bucketize(part.double(), thresholds, out_int32=True)])
    return out.view(values.shape)


def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """`table[codes]`, shaped as integer `codes`.

    Example:
        >>> lookup(torch.tensor([2, 0], dtype=torch.uint8), torch.tensor([0.0, 5.0, 7.0])).tolist()
        [7.0, 0.0]
    """
    if table.requires_grad:  # for a second derivative: differentiable, not in place
        return table[codes.int()]
    out = table.new_empty(codes.numel())
    for part, into in zip(codes.reshape(-1).split(CHUNK), out.split(CHUNK), strict=True):
        into.copy_(table[part.int()])
    return out.view(codes.shape)


def penalised(values: Tensor, levels: Tensor, bits: Tensor, price: float) -> Tensor:
    """Index minimising (value − level)² + price · bits of that level, uint8, shaped as `values`.

    In one dimension each level wins on one interval or nowhere, so this is a search in sorted
    thresholds, whatever the prices.

    Args:
        levels: float64 `[k]`, any order, at most 256.
        bits: float64 `[k]`, what coding each level costs.
        price: how much squared error a bit is worth, at least 0.

    Example:
        >>> levels, bits = torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 5.0]).double()
        >>> penalised(torch.tensor([0.6, 0.9]), levels, bits, 0.0).tolist()
        [1, 1]
        >>> penalised(torch.tensor([0.6, 0.9]), levels, bits, 0.1).tolist()
        [0, 1]

    Source: Chou, Lookabaugh, Gray, *Entropy-Constrained Vector Quantization*, 1989.
    """
    # v² is common to all, so level c is the line −2c·v + (c² + price·bits): a lower envelope.
    costs = (levels**2 + price * bits).tolist()
    winners: list[int] = []
    starts: list[float] = []
    for i in sorted(range(len(costs)), key=lambda i: (float(levels[i]), costs[i])):
        if winners and levels[i] == levels[winners[-1]]:
            continue
        start = float("-inf")
        while winners:
            start = (costs[i] - costs[winners[-1]]) / float(2 * (levels[i] - levels[winners[-1]]))
            if start > starts[-1]:
                break
            winners.pop()
            starts.pop()
            start = float("-inf")
        winners.append(i)
        starts.append(start)
    thresholds = torch.tensor(starts[1:], dtype=torch.float64)
    return _cut(values, thresholds, torch.tensor(winners))


def entropy_codes(
    values: Tensor, levels: Tensor, zeros: int, penalty: float, iterations: int = 50
) -> tuple[Tensor, Tensor]:
    """Levels and codes that trade squared error for coded bits, zero being one more symbol.

    Minimises Σ (v − q(v))² / mean(v²) + penalty · Σ −log2 p(q(v)) by turns: codes, symbol
    frequencies p, level means. Levels that nobody chooses are dropped. Code 0 is the value zero,
    code i the level i − 1.

    Args:
        values: the weights that are not pruned, floating point, any shape.
        levels: ascending starting levels, at most 255.
        zeros: how many more symbols 0 there are: the pruned weights.
        penalty: λ, relative squared error per bit; 0 gives nearest levels and no code 0.

    Returns:
        Levels, float64 ascending, and codes, uint8 shaped as `values`.

    Example:
        >>> values = torch.tensor([1.0, 1.1, 0.05, 1.0, -1.0])
        >>> levels = torch.tensor([-1.0, 0.05, 1.0, 1.1])
        >>> entropy_codes(values, levels, 20, penalty=0.02)[1].tolist()
        [2, 2, 0, 2, 1]
    """
    if penalty < 0:
        raise ConfigError(f"penalty is {penalty}: give 0 or more")
    levels = levels.double()
    if penalty == 0:
        return levels, nearest(values, levels) + 1
    price = penalty * float(values.double().square().mean())
    codes = nearest(values, levels) + 1
    for _ in range(iterations):
        counts = torch.tensor(count_symbols(codes, levels.numel() + 1)).double()
        used = counts[1:] > 0
        counts[0] += zeros
        means = _means(values.reshape(-1), codes.reshape(-1), torch.cat([counts[:1] * 0, levels]))
        levels, counts = means[1:][used], torch.cat([counts[:1], counts[1:][used]])
        # A symbol that does not occur yet would never be chosen: price it as if it did once.
        bits = counts.sum().log2() - counts.clamp(min=1).log2()
        moved = penalised(values, torch.cat([levels.new_zeros(1), levels]), bits, price)
        stable = bool(used.all()) and torch.equal(moved, codes)
        codes = moved
        if stable:
            break
    return _compact(levels, codes)


def _compact(levels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the levels without members and number the rest upwards."""
    used = torch.tensor(count_symbols(codes, levels.numel() + 1))[1:] > 0
    number = torch.cat([torch.zeros(1, dtype=torch.int64), used.cumsum(0) * used])
    return levels[used], lookup(codes, number.to(torch.uint8))
