"""Plain torch, any device, one tensor after another: what the other kernels must equal bit for bit.

Every product and every sum is rounded to float32 on its own; a fused multiply-add would differ.
What a bfloat16 state stores is then rounded as `rounding` says.
Shapes: T tensors, n elements in all, K selected. u, v float32 or bfloat16 `[n]`; update float32
`[T, 4]`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgc.core.kernels.rounding import U_BITS, V_BITS, rounded
from dgc.core.layout import Layout
from dgc.core.sparse import Sparse, SparseBatch


def squared_norm(grads: Sequence[Tensor]) -> float:
    """Σ g² over all of `grads`, each square and sum in float64; nan or inf if an element is."""
    return float(sum(grad.detach().double().square().sum() for grad in grads))


def accumulate_(
    grads: Sequence[Tensor],
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    seed: int = 0,
) -> bool:
    """u ← m·u + c·g and v ← v + lr·u, or Nesterov's form; nothing if an element of g is not finite.

    Example, m = 2, c = 3, lr = 10, g = 1, u = 5, v = 7: u ← 10 + 3 = 13, v ← 7 + 130 = 137;
    with Nesterov u ← 2·(5 + 3) = 16, v ← 7 + 10·(16 + 3) = 197.
    """
    if not all(bool(grad.isfinite().all()) for grad in grads):
        return False
    ends = layout.offsets[:-1], layout.offsets[1:]
    for grad, row, start, end in zip(grads, update.tolist(), *ends, strict=True):
        momentum, gain, lr, nesterov = row
        places = torch.arange(start, end, device=v.device)
        entered = grad.detach().reshape(-1).float() * gain
        if u is not None:
            u_t = u[start:end].float()
            moved = (u_t + entered) * momentum if nesterov else u_t * momentum + entered
            u[start:end] = rounded(moved, places, u.dtype, seed, U_BITS)
            entered = moved + entered if nesterov else moved
        v[start:end] = rounded(v[start:end] + entered * lr, places, v.dtype, seed, V_BITS)
    return True


def largest(flat: Tensor, k: int) -> Tensor:
    """Ascending int64 indices of the k largest magnitudes of `flat`; of equal ones the first.

    Example: [2, -3, 0, 3, -2], k = 3: the third magnitude is 2, 3 and 3 are above it, one of the
    two 2s is still wanted and index 0 is the first: [0, 1, 3].
    """
    magnitude = flat.abs()
    kth = torch.topk(magnitude, k, sorted=True).values[-1]
    above = magnitude > kth
    ties = (magnitude == kth).nonzero().flatten()
    chosen = torch.cat([above.nonzero().flatten(), ties[: k - int(above.sum())]])
    return chosen.sort().values


def select_(
    v: Tensor, layout: Layout, counts: Sequence[int], thresholds: Tensor | None
) -> SparseBatch:
    """The counts[t] largest magnitudes of each tensor, never a zero; `thresholds` is ignored."""

    def one(v_t: Tensor, k: int) -> Sparse:
        k = min(k, int(v_t.count_nonzero())) if k else 0
        indices = largest(v_t, k) if k else torch.empty(0, dtype=torch.int64, device=v.device)
        return Sparse(indices, v_t[indices].float(), v_t.numel())

    return SparseBatch.cat([one(v_t, k) for v_t, k in zip(layout.split(v), counts, strict=True)])


def accumulate_select_(
    grads: Sequence[Tensor],
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    counts: Sequence[int],
    thresholds: Tensor | None,
    seed: int = 0,
) -> tuple[bool, SparseBatch]:
    """`accumulate_`, then `select_`; an empty selection where a gradient is not finite."""
    finite = accumulate_(grads, u, v, layout, update, seed)
    return finite, select_(v, layout, counts if finite else [0] * len(counts), thresholds)


def release_(
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    batch: SparseBatch,
    sent: Tensor,
    seed: int = 0,
) -> Tensor | None:
    """v[S] ← v[S] − sent, and u[S] ← 0 where u is given: returns what it was.

    Example: v = [4, 9], S = {1}, sent = [8]: v = [4, 1].
    """
    places = layout.places(batch.indices, batch.counts)
    add_(v, places, -sent, seed)
    if u is None:
        return None
    cleared = u[places]
    u[places] = 0.0
    return cleared


def add_(v: Tensor, places: Tensor, values: Tensor, seed: int = 0) -> None:
    """v[places] ← v[places] + values, for places that differ.

    Example: v = [4, 9], places = [1], values = [-8]: v = [4, 1].
    """
    v[places] = rounded(v[places] + values, places, v.dtype, seed, V_BITS)


def scatter_add_(
    grads: Sequence[Tensor],
    positions: Sequence[Tensor],
    values: Sequence[Tensor],
    counts: Tensor,
    scales: Sequence[float],
) -> None:
    """grads[t] += scales[t] · values of message after message, for positions that differ.

    Example: grads = [1, 1], [1], positions = [0, 2], values = [3, 5], scales = 1, 2: [4, 1], [11].
    """
    for where, what, count in zip(positions, values, counts.tolist(), strict=True):
        start = 0
        for grad, scale in zip(grads, scales, strict=True):
            inside = (where[:count] >= start) & (where[:count] < start + grad.numel())
            grad.view(-1)[where[:count][inside] - start] += what[:count][inside] * scale
            start += grad.numel()


def precondition_(
    grads: Sequence[Tensor], seconds: Sequence[Tensor], scales: Tensor, rows: Tensor
) -> bool:
    """s ← β·s + c·e² and g ← e / (scale·√s + ε) with e = a·g; only nan if an e² is not finite.

    Example, a = 2, β = c = 0.5, ε = scale = 1, g = 3, s = 14: e = 6, s ← 7 + 18 = 25, g ← 6/6.
    """
    scaled = [grad * gain for grad, (gain, *_) in zip(grads, rows.tolist(), strict=True)]
    finite = all(bool(e.square().isfinite().all()) for e in scaled)
    each = zip(grads, seconds, scaled, scales.tolist(), rows.tolist(), strict=True)
    for grad, second, e, scale, (_, kept, share, eps) in each:
        if finite:
            second.mul_(kept).add_((e.square() * share).view_as(second))
        root = second.double().sqrt().float() * scale + eps  # torch's float32 root is off by a bit
        grad.copy_(e / root.view_as(e)) if finite else grad.fill_(torch.nan)
    return finite


def decay_(
    grads: Sequence[Tensor], params: Sequence[Tensor], buffers: Sequence[Tensor], rows: Tensor
) -> None:
    """b ← m·b + c·λ·p and g ← g + scale·b, or Nesterov's form; b ← kept·b where g was not 0.

    Example, λ = m = kept = 0.5, c = 1, scale = 10, g = 1, p = 4, b = 6: b ← 3 + 2 = 5, g ← 51,
    b ← 2.5; with Nesterov g ← 1 + 10·(2 + 2.5) = 46.
    """
    for grad, param, buffer, row in zip(grads, params, buffers, rows.tolist(), strict=True):
        decay, momentum, gain, nesterov, scale, kept = row
        d = param * decay
        buffer.mul_(momentum).add_(d * gain)
        step = d + buffer * momentum if nesterov else buffer
        arrived = grad != 0
        grad.add_(step * scale)
        buffer.mul_(torch.where(arrived, kept, 1.0))
