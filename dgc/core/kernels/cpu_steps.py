"""Compiled loops over an optimizer's state: Adam's second moment, the momentum of weight decay.

Tensors are given by their addresses; `edges[t]` counts the elements of those before t, and a call
does the part of the work from `lo` to `hi`, so that threads share it evenly.
"""

from typing import Any

import numpy as np

from dgc.core.kernels.compiled import dividing, kernel
from dgc.core.kernels.cpu_sweep import block_max, first_segment, tensor_at


@kernel
def squares_finite(addresses: Any, edges: Any, rows: Any, lo: int, hi: int) -> bool:
    """Whether the square of rows[t, 0] times each element of the part is finite.

    Example: an element of 1e20: False.
    """
    t, top = first_segment(edges, lo), np.empty(1, np.int32)
    while t < addresses.size and edges[t] < hi:
        first, last = max(lo, edges[t]) - edges[t], min(hi, edges[t + 1]) - edges[t]
        top[0] = block_max(tensor_at(addresses[t], first, last).view(np.int32))
        entering = rows[t, 0] * top.view(np.float32)[0]
        if not np.isfinite(entering * entering):
            return False
        t += 1
    return True


@dividing
def _precondition(g: Any, second: Any, scale: Any, row: Any) -> None:
    gain, kept, share, eps = row[0], row[1], row[2], row[3]
    for i in range(g.size):
        entering = gain * g[i]
        second[i] = kept * second[i] + share * (entering * entering)
        g[i] = entering / (scale * np.sqrt(second[i]) + eps)


@kernel
def precondition(
    grads: Any, seconds: Any, scales: Any, rows: Any, edges: Any, lo: int, hi: int
) -> None:
    """`reference.precondition_` of the part, all of whose squares are finite."""
    t = first_segment(edges, lo)
    while t < grads.size and edges[t] < hi:
        first, last = max(lo, edges[t]) - edges[t], min(hi, edges[t + 1]) - edges[t]
        g, second = tensor_at(grads[t], first, last), tensor_at(seconds[t], first, last)
        _precondition(g, second, scales[t], rows[t])
        t += 1


@kernel
def _decay(g: Any, p: Any, b: Any, row: Any) -> None:
    decay, momentum, gain, scale, kept = row[0], row[1], row[2], row[4], row[5]
    nesterov = row[3] != 0
    for i in range(g.size):
        d = decay * p[i]
        moved = momentum * b[i] + gain * d
        step = d + momentum * moved if nesterov else moved
        b[i] = moved * (kept if g[i] != 0 else np.float32(1))
        g[i] = g[i] + scale * step


@kernel
def decay(grads: Any, params: Any, buffers: Any, rows: Any, edges: Any, lo: int, hi: int) -> None:
    """`reference.decay_` of the part."""
    t = first_segment(edges, lo)
    while t < grads.size and edges[t] < hi:
        first, last = max(lo, edges[t]) - edges[t], min(hi, edges[t + 1]) - edges[t]
        p, b = tensor_at(params[t], first, last), tensor_at(buffers[t], first, last)
        _decay(tensor_at(grads[t], first, last), p, b, rows[t])
        t += 1
