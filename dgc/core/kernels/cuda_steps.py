"""Triton kernels over an optimizer's state: Adam's second moment, the momentum of weight decay.

Results equal those of `reference` bit for bit: roots and quotients are rounded as IEEE 754 says, and
launches forbid fused multiply-adds. Tensors are given by tables of their addresses; a program works
on BLOCK elements of one tensor, as in `cuda_kernels`. The host waits for nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgc.core.kernels.cuda_kernels import MAGNITUDE
from dgc.core.kernels.cuda_tables import BLOCK, blocks_of, uploaded

_Table = tuple[Tensor, ...]


def precondition_(
    grads: Sequence[Tensor], seconds: Sequence[Tensor], scales: Tensor, rows: Tensor
) -> Tensor:
    """As `reference.precondition_`; bool `[]`."""
    tables, device = _tables(grads, seconds), grads[0].device
    bad = torch.zeros(1, dtype=torch.int64, device=device)
    there = rows.to(device, non_blocking=True)
    blocks = blocks_of(tuple(grad.numel() for grad in grads), device)
    if grid := blocks.owners.numel():
        options: dict[str, Any] = {"BLOCK": BLOCK, "enable_fp_fusion": False}
        squares_finite[(grid,)](tables[0], there, *blocks[:3], bad, **options)
        precondition[(grid,)](*tables, scales, there, *blocks[:3], bad, **options)
    return bad[0] == 0


def decay_(
    grads: Sequence[Tensor], params: Sequence[Tensor], buffers: Sequence[Tensor], rows: Tensor
) -> None:
    """As `reference.decay_`."""
    tables, device = _tables(grads, params, buffers), grads[0].device
    blocks = blocks_of(tuple(grad.numel() for grad in grads), device)
    if grid := blocks.owners.numel():
        there = rows.to(device, non_blocking=True)
        decay[(grid,)](*tables, there, *blocks[:3], BLOCK=BLOCK, enable_fp_fusion=False)


def _tables(*lists: Sequence[Tensor]) -> _Table:
    """Where the tensors of each list lie, int64 `[T]` on their device, in one upload."""
    addresses = [tensor.data_ptr() for tensors in lists for tensor in tensors]
    return uploaded(addresses, lists[0][0].device).view(len(lists), -1).unbind()


@triton.jit  # type: ignore[untyped-decorator]
def _block(owners: "Any", firsts: "Any", numels: "Any", BLOCK: tl.constexpr) -> "Any":
    """The program's tensor, its elements, and which of these there are."""
    b = tl.program_id(0)
    t = tl.load(owners + b)
    at = tl.load(firsts + b) + tl.arange(0, BLOCK)
    return t, at, at < tl.load(numels + t)


@triton.jit  # type: ignore[untyped-decorator]
def _of(addresses: "Any", t: "Any") -> "Any":
    """Where the float32 elements of tensor t begin."""
    return tl.load(addresses + t).to(tl.pointer_type(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def squares_finite(
    grads: "Any",
    rows: "Any",
    owners: "Any",
    firsts: "Any",
    numels: "Any",
    bad: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """bad ← 1 if a square in the block is inf or nan. Example: that of 1e20 is."""
    t, at, inside = _block(owners, firsts, numels, BLOCK)
    value = tl.load(_of(grads, t) + at, mask=inside, other=0.0) * tl.load(rows + 4 * t)
    if tl.max((value * value).to(tl.int32, bitcast=True) & MAGNITUDE) >= 0x7F800000:
        tl.atomic_max(bad, 1)


@triton.jit  # type: ignore[untyped-decorator]
def precondition(
    grads: "Any",
    seconds: "Any",
    scales: "Any",
    rows: "Any",
    owners: "Any",
    firsts: "Any",
    numels: "Any",
    bad: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """One block of `reference.precondition_`; g ← nan if `bad`."""
    t, at, inside = _block(owners, firsts, numels, BLOCK)
    g = _of(grads, t) + at
    if tl.load(bad) == 0:
        s = _of(seconds, t) + at
        row = rows + 4 * t
        entering = tl.load(g, mask=inside, other=0.0) * tl.load(row)
        second = tl.load(s, mask=inside, other=1.0) * tl.load(row + 1)
        second += entering * entering * tl.load(row + 2)
        tl.store(s, second, mask=inside)
        root = tl.sqrt_rn(second) * tl.load(scales + t) + tl.load(row + 3)
        tl.store(g, tl.div_rn(entering, root), mask=inside)
    else:
        tl.store(g, tl.full((BLOCK,), float("nan"), tl.float32), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def decay(
    grads: "Any",
    weights: "Any",
    buffers: "Any",
    rows: "Any",
    owners: "Any",
    firsts: "Any",
    numels: "Any",
    BLOCK: tl.constexpr,
) -> None:
    """One block of `reference.decay_`."""
    t, at, inside = _block(owners, firsts, numels, BLOCK)
    g = _of(grads, t) + at
    p = _of(weights, t) + at
    buffer = _of(buffers, t) + at
    row = rows + 6 * t
    momentum, nesterov = tl.load(row + 1), tl.load(row + 3) != 0
    mean = tl.load(g, mask=inside, other=0.0)
    d = tl.load(p, mask=inside, other=0.0) * tl.load(row)
    moved = momentum * tl.load(buffer, mask=inside, other=0.0) + d * tl.load(row + 2)
    step = tl.where(nesterov, d + moved * momentum, moved)
    tl.store(g, mean + step * tl.load(row + 4), mask=inside)
    tl.store(buffer, tl.where(mean != 0, moved * tl.load(row + 5), moved), mask=inside)
