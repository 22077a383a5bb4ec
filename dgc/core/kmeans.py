"""Optimal k-means in one dimension, of values that may stand for several, by dynamic programming.

Clusters are runs of the sorted values. With E[c, j] the least error of the first j values in c clusters,

    E[c, j] = min over i < j of E[c − 1, i] + cost(i, j)

and the i of the minimum never falls as j grows: once it is known for two j, those between need only
look between. That takes n·log n steps a cluster.

Source: Wu, *Optimal Quantization by Matrix Searching*, J. Algorithms 1991, for that the i is monotone.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from dgc.core.kernels.compiled import kernel

Array = npt.NDArray[Any]


def optimal_means(values: Array, counts: Array, k: int) -> Array:
    """The means of the k clusters that minimise Σ count · (value − mean of its cluster)².

    Args:
        values: ascending float64 `[n]`.
        counts: float64 `[n]`, how many each stands for, above 0.
        k: 1 to n.

    Returns:
        float64 `[k]`, ascending.

    Example:
        >>> optimal_means(np.array([0.0, 1.0, 9.0]), np.array([3.0, 1.0, 1.0]), 2).tolist()
        [0.25, 9.0]
    """
    middle = np.average(values, weights=counts)  # so that differences of sums lose little
    sums = np.zeros((3, values.size + 1))
    for power in range(3):
        np.cumsum(counts * (values - middle) ** power, out=sums[power, 1:])
    edges = np.empty(k + 1, np.int64)
    _cut(sums, np.empty((k, values.size + 1), np.int32), edges)
    totals, numbers = (np.add.reduceat(each, edges[:-1]) for each in (counts * values, counts))
    means: Array = totals / numbers
    return means


@kernel
def _cost(sums: Array, i: int, j: int) -> float:
    """Of the values i to j − 1 in one cluster."""
    count = sums[0, j] - sums[0, i]
    total = sums[1, j] - sums[1, i]
    return sums[2, j] - sums[2, i] - total * total / count  # type: ignore[no-any-return]


@kernel
def _cut(sums: Array, last: Array, edges: Array) -> None:
    """edges ← where the clusters begin, and n. `last[c, j]` is where the last of c + 1 begins."""
    k, n = last.shape[0], last.shape[1] - 1
    before, error = np.empty(n + 1), np.empty(n + 1)
    for j in range(1, n + 1):
        error[j], last[0, j] = _cost(sums, 0, j), 0
    for c in range(1, k):
        before, error = error, before
        step = 1
        while step <= n:
            step *= 2
        while step:  # j = step, 3·step, 5·step, ...: the even multiples are known
            for j in range(step, n + 1, 2 * step):
                if j <= c:
                    last[c, j] = c  # as far left as it can be
                    continue
                first, end = c, j - 1
                if j - step > c:
                    first = last[c, j - step]
                if j + step <= n:
                    end = min(end, last[c, j + step])
                error[j], last[c, j] = np.inf, first
                for i in range(first, end + 1):
                    found = before[i] + _cost(sums, i, j)
                    if found < error[j]:
                        error[j], last[c, j] = found, i
            step //= 2
    edges[k] = n
    for c in range(k - 1, -1, -1):
        edges[c] = last[c, edges[c + 1]]
