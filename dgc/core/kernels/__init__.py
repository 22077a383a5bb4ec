"""The passes over a bucket's memory and over an optimizer's state; the one place that picks an
implementation by device.

`reference` is plain torch and defines the results, `cpu` is numba, `cuda` is Triton: all give the
same bits.
The state is float32, or bfloat16: then arithmetic is float32, and what is stored is rounded up or
down at random, to the value in the mean, as `rounding` defines. Every call that writes a bfloat16
state needs another `seed`; a float32 state does not depend on it.
Shapes: T tensors, n elements in all, K selected.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from dgc.core.kernels import reference
from dgc.core.kernels.rounding import seed_of
from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch

__all__ = [
    "accumulate_",
    "accumulate_select_",
    "add_",
    "addresses",
    "codes_there",
    "decay_",
    "dense",
    "precondition_",
    "release_",
    "scatter_add_",
    "seed_of",
    "select_",
    "squared_norm",
]


@contextmanager
def _for(device: torch.device) -> Iterator[ModuleType]:
    """The implementation for `device`; a GPU is the current one meanwhile: Triton launches there."""
    # Imported when first needed: a compiler takes longer to load than all the rest.
    if device.type == "cpu":
        from dgc.core.kernels import cpu

        yield cpu
    elif device.type == "cuda":
        from dgc.core.kernels import cuda

        with torch.cuda.device(device):
            yield cuda
    else:
        yield reference


def codes_there(device: torch.device) -> bool:
    """Whether messages are made on `device`, and not on the host."""
    return device.type == "cuda"


def dense(grads: Sequence[Tensor]) -> list[Tensor]:
    """Each as contiguous float32: itself where it already is.

    Example:
        >>> dense([torch.ones(2, dtype=torch.bfloat16)])[0].dtype
        torch.float32
    """
    return [grad.detach().to(torch.float32).contiguous() for grad in grads]


def addresses(grads: Sequence[Tensor]) -> Tensor:
    """Where contiguous float32 gradients lie, int64 `[T]` on the CPU: see `accumulate_select_`."""
    return torch.tensor([grad.data_ptr() for grad in grads], dtype=torch.int64)


def squared_norm(grads: Sequence[Tensor]) -> float:
    """Σ g² over all elements of `grads`, in float64; not finite if an element is not.

    Example:
        >>> squared_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        25.0
    """
    on: dict[torch.device, list[Tensor]] = {}
    for grad in dense(grads):
        on.setdefault(grad.device, []).append(grad)
    total = 0.0
    for device, each in on.items():
        with _for(device) as passes:
            total += float(passes.squared_norm(each))
    return total


def accumulate_(
    grads: Sequence[Tensor] | Tensor,
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    seed: int | Tensor = 0,
) -> bool:
    """Let the gradients of a bucket enter its memory; overwrites `u` and `v`.

    With (m, c, lr, nesterov) the row of a tensor, every operation rounded to float32:

        nesterov = 0:   u ← m·u + c·g        v ← v + lr·u
        nesterov = 1:   u ← m·(u + c·g)      v ← v + lr·(u + c·g)
        u is None:                           v ← v + lr·(c·g)

    Args:
        grads: T tensors of `layout.numels` elements, of any shape and float dtype; only read.
        u: momentum, float32 or bfloat16 `[n]`, or None.
        v: accumulated gradient, of the dtype of `u`, `[n]`.
        layout: where each tensor lies in `u` and `v`.
        update: float32 `[T, 4]` on the CPU, rows (m, c, lr, nesterov).
        seed: of the rounding, in [0, 2^32).

    Returns:
        False if an element of a gradient is not finite; then `u` and `v` are left as they were.

    Example:
        >>> u, v = torch.tensor([5.0]), torch.tensor([7.0])
        >>> row = torch.tensor([[2.0, 3.0, 10.0, 0.0]])
        >>> accumulate_([torch.tensor([1.0])], u, v, Layout.of([1]), row), u.item(), v.item()
        (True, 13.0, 137.0)
    """
    entering = grads if isinstance(grads, Tensor) else dense(grads)
    with _for(v.device) as passes:
        return bool(passes.accumulate_(entering, u, v, layout, update, seed))


def select_(
    v: Tensor, layout: Layout, counts: Sequence[int], thresholds: Tensor | None
) -> SparseBatch:
    """The counts[t] largest magnitudes of each tensor t; of equal ones the first; never a zero.

    On a GPU a selection has all counts[t] slots of each tensor, and a slot that is not filled has
    the value 0; see `SparseBatch.filled`.

    Args:
        v: float32 or bfloat16 `[n]`, finite; the values selected are float32.
        layout: where each tensor lies in `v`.
        counts: at most how many of each tensor, length T, each in [0, numels[t]].
        thresholds: float32 `[T]`, overwritten, or None. A guess of where each selection ends, 0
            where there is none. It saves time and never changes the result.

    Example:
        >>> select_(torch.tensor([2.0, -3.0, 0.0, 0.0]), Layout.of([3, 1]), [1, 1], None).counts
        (1, 0)
    """
    with _for(v.device) as passes:
        batch: SparseBatch = passes.select_(v, layout, tuple(counts), thresholds)
    return batch


def accumulate_select_(
    grads: Sequence[Tensor] | Tensor,
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    counts: Sequence[int],
    thresholds: Tensor | None,
    seed: int | Tensor = 0,
) -> tuple[bool | Tensor, SparseBatch]:
    """`accumulate_` and then `select_`, in one pass where `thresholds` allow it.

    On a GPU `grads` may be their `addresses`, and `seed` int64 `[]`, on the device: then what a step
    changes is all there, and the work can be recorded once and run again.

    Returns:
        What `accumulate_` returns, on a GPU as bool `[]` there; and the selection: an empty one
        where that is False.
    """
    entering = grads if isinstance(grads, Tensor) else dense(grads)
    with _for(v.device) as passes:
        found: tuple[bool | Tensor, SparseBatch] = passes.accumulate_select_(
            entering, u, v, layout, update, tuple(counts), thresholds, seed
        )
    return found


def release_(
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    batch: SparseBatch,
    sent: Tensor,
    masking: bool,
    seed: int | Tensor = 0,
) -> Tensor | None:
    """v[S] ← v[S] − sent, and with `masking` u[S] ← 0; overwrites `u` and `v`.

    Args:
        u: float32 or bfloat16 `[n]` or None; left alone without `masking`.
        v: of the same dtype, `[n]`.
        layout: where each tensor lies in `u` and `v`.
        batch: S, the selection.
        sent: float32 `[K]`, what the receivers will decode for S.
        masking: momentum factor masking.
        seed: of the rounding, in [0, 2^32); on a GPU it may be int64 `[]` there.

    Returns:
        u[S] as it was, `[K]`, or None where it was left alone.

    Example:
        >>> v, layout = torch.tensor([4.0, 9.0]), Layout.of([2])
        >>> batch = select_(v, layout, [1], None)
        >>> release_(None, v, layout, batch, torch.tensor([8.0]), masking=False)
        >>> v.tolist()
        [4.0, 1.0]
    """
    held = u if masking else None
    with _for(v.device) as passes:
        cleared: Tensor | None = passes.release_(held, v, layout, batch, sent, seed)
    return cleared


def add_(v: Tensor, places: Tensor, values: Tensor, seed: int = 0) -> None:
    """v[places] ← v[places] + values; overwrites `v`.

    Args:
        v: float32 or bfloat16 `[n]`.
        places: int64 `[K]`, all different where the value is not 0.
        values: float32 `[K]`.
        seed: of the rounding, in [0, 2^32).

    Example:
        >>> v = torch.tensor([4.0, 9.0])
        >>> add_(v, torch.tensor([1]), torch.tensor([-8.0]))
        >>> v.tolist()
        [4.0, 1.0]
    """
    with _for(v.device) as passes:
        passes.add_(v, places, values, seed)


def scatter_add_(
    grads: Sequence[Tensor],
    positions: Sequence[Tensor],
    values: Sequence[Tensor],
    counts: Tensor,
    scales: Sequence[float],
) -> None:
    """grads[t] += scales[t] · values of message after message; overwrites `grads`.

    Product and sum are rounded to float32 each. A GPU's host does not wait.

    Args:
        grads: T contiguous float32 tensors on the device of all the others.
        positions: of each of P messages int64 `[K]`, all different, in the T tensors laid end to end.
        values: of each message float32 `[K]`.
        counts: int64 `[P]`, how many positions of each message count: the first ones.
        scales: T factors.

    Example:
        >>> grads, positions = [torch.ones(2), torch.ones(3)], torch.tensor([1, 2, 0])
        >>> values, counts = torch.tensor([3.0, 5.0, 7.0]), torch.tensor([2])
        >>> scatter_add_(grads, [positions], [values], counts, [1.0, 0.5])
        >>> [grad.tolist() for grad in grads]
        [[1.0, 4.0], [3.5, 1.0, 1.0]]
    """
    with _for(grads[0].device) as passes:
        passes.scatter_add_(grads, positions, values, counts, scales)


def precondition_(
    grads: Sequence[Tensor], seconds: Sequence[Tensor], scales: Tensor, rows: Tensor
) -> bool | Tensor:
    """Divide gradients by the root of their second moment, as Adam does; overwrites both.

    With (a, β, c, ε) the row of a tensor, every operation rounded to float32:

        e = a·g        s ← β·s + c·e²        g ← e / (scale·√s + ε)

    Args:
        grads: T contiguous float32 tensors.
        seconds: s, T contiguous float32 tensors of as many elements.
        scales: float32 `[T]`, on the device of the others: what takes out a bias of s.
        rows: float32 `[T, 4]` on the CPU.

    Returns:
        False, on a GPU as bool `[]` there, if an e² is not finite: then all of `grads` are nan and
        `seconds` are left as they were.

    Example:
        >>> g, s, row = torch.tensor([3.0]), torch.tensor([14.0]), [2.0, 0.5, 0.5, 1.0]
        >>> precondition_([g], [s], torch.ones(1), torch.tensor([row])), g.item(), s.item()
        (True, 1.0, 25.0)
    """
    with _for(grads[0].device) as passes:
        found: bool | Tensor = passes.precondition_(grads, seconds, scales, rows)
    return found


def decay_(
    grads: Sequence[Tensor], params: Sequence[Tensor], buffers: Sequence[Tensor], rows: Tensor
) -> None:
    """Add the momentum of weight decay to mean gradients; overwrites `grads` and `buffers`.

    With (λ, m, c, nesterov, scale, kept) the row of a tensor, every operation rounded to float32:

        d = λ·p        b ← m·b + c·d        g ← g + scale·b, with Nesterov g + scale·(d + m·b)
        b ← kept·b     where g was not 0

    Args:
        grads: g, T tensors, of any layout, dtype and device.
        params: p, T tensors of the shapes of `grads`; only read.
        buffers: b, T tensors of these shapes.
        rows: float32 `[T, 6]` on the CPU.

    Example:
        >>> g, p, b = torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([6.0])
        >>> decay_([g], [p], [b], torch.tensor([[0.5, 0.5, 1.0, 0.0, 10.0, 0.5]]))
        >>> g.item(), b.item()
        (51.0, 2.5)
    """
    chosen: dict[torch.device | None, list[int]] = {}
    for t, tensors in enumerate(zip(grads, params, buffers, strict=True)):
        device = grads[t].device if _laid_out_alike(*tensors) else None
        chosen.setdefault(device, []).append(t)
    for device, which in chosen.items():
        parts = [[each[t] for t in which] for each in (grads, params, buffers)]
        with nullcontext(reference) if device is None else _for(device) as passes:
            passes.decay_(*parts, rows[which])


def _laid_out_alike(*tensors: Tensor) -> bool:
    """Whether float32 memory holds their elements in the same order, without gaps."""
    if any(tensor.dtype is not torch.float32 for tensor in tensors):
        return False
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    return all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
