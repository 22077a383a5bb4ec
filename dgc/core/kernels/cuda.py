"""The kernels on a GPU: Triton for the passes over the state, torch for the few candidates.

The host waits for the device once a bucket, to read whether the gradient is finite and how many
elements of each tensor reached their threshold; what it uploads are short tables, without waiting. A
tensor where too few did, or more than its buffer holds, is selected by `reference`, which waits five
times. Results equal those of `reference` bit for bit; that needs products and sums rounded
one by one, so launches forbid fused multiply-adds. A bfloat16 state goes to the kernels as int16, the
upper halves of float32. Shapes: T tensors, n elements, B blocks.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgc.core.kernels import reference, rounding
from dgc.core.kernels.cuda_trim import (
    Candidates,
    remember_,
    replace,
    restart_,
    runs,
    target,
    trim,
    uploaded,
)
from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch

squared_norm = reference.squared_norm
release_ = reference.release_

BLOCK = 4096
"""Elements of a program, all of one tensor."""
NOTHING = 0x7FFFFFFF
"""A threshold, as bits, that no element reaches."""
# Triton looks names up while it compiles, those of annotations too, and may not find "Any".
U_BITS, V_BITS = tl.constexpr(rounding.U_BITS), tl.constexpr(rounding.V_BITS)


@triton.jit  # type: ignore[untyped-decorator]
def _check(
    addresses: "Any", owners: "Any", firsts: "Any", numels: "Any", bad: "Any", BLOCK: tl.constexpr
) -> None:
    """bad ← 1 if the block holds inf or nan. Example: bits 0x7F800000 are inf."""
    b = tl.program_id(0)
    t = tl.load(owners + b)
    at = tl.load(firsts + b) + tl.arange(0, BLOCK)
    g = tl.load(addresses + t).to(tl.pointer_type(tl.float32))
    bits = tl.load(g + at, mask=at < tl.load(numels + t), other=0.0).to(tl.int32, bitcast=True)
    if tl.max(bits & 0x7FFFFFFF) >= 0x7F800000:
        tl.atomic_max(bad, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _mixed(x: "Any") -> "Any":
    """`rounding.mixed` of uint32. Example: 1 becomes 1753845952."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def _load(state: "Any", place: "Any", inside: "Any") -> "Any":
    """The state at `place` as float32. Example: the half 0x3F81 is 1 + 2^-7."""
    value = tl.load(state + place, mask=inside, other=0)
    if state.dtype.element_ty == tl.int16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _store(state: "Any", place: "Any", value: "Any", inside: "Any", draw: "Any") -> "Any":
    """Store `value`, rounded if the state has halves, and return what was stored.

    Example: 0x3F80C000 becomes the half 0x3F81 where the low half of `draw` is 0x4000 or more.
    """
    if state.dtype.element_ty == tl.int16:
        half = (value.to(tl.int32, bitcast=True) + (draw & 0xFFFF).to(tl.int32)) >> 16
        tl.store(state + place, half.to(tl.int16), mask=inside)
        value = (half << 16).to(tl.float32, bitcast=True)
    else:
        tl.store(state + place, value, mask=inside)
    return value


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def _advance(
    addresses: "Any",
    u: "Any",
    v: "Any",
    owners: "Any",
    firsts: "Any",
    numels: "Any",
    offsets: "Any",
    rows: "Any",
    low: "Any",
    edges: "Any",
    passed: "Any",
    where: "Any",
    what: "Any",
    bad: "Any",
    seed: "Any",
    UPDATE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update a block, unless `bad`, and append what reaches low[t] to the buffer of its tensor.

    Example: edges = [0, 4], passed = [3], a block with two hits: the first goes to place 3, the
    second finds the buffer full, and passed becomes [5].
    """
    if tl.load(bad) == 0:
        b = tl.program_id(0)
        t = tl.load(owners + b)
        at = tl.load(firsts + b) + tl.arange(0, BLOCK)
        inside = at < tl.load(numels + t)
        place = tl.load(offsets + t) + at
        value = _load(v, place, inside)
        if UPDATE:
            draw = _mixed(place.to(tl.uint32) ^ seed.to(tl.uint32))
            g = tl.load(addresses + t).to(tl.pointer_type(tl.float32))
            row = rows + 4 * t
            entered = tl.load(g + at, mask=inside, other=0.0) * tl.load(row + 1)
            if MOMENTUM:
                momentum, nesterov = tl.load(row), tl.load(row + 3) != 0
                old = _load(u, place, inside)
                moved = tl.where(nesterov, momentum * (old + entered), momentum * old + entered)
                _store(u, place, moved, inside, draw >> U_BITS)
                entered = tl.where(nesterov, moved + entered, moved)
            value = value + entered * tl.load(row + 2)
            value = _store(v, place, value, inside, draw >> V_BITS)
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        hit = inside & (bits >= tl.load(low + t))
        count = tl.sum(hit.to(tl.int64))
        if count > 0:
            slot = tl.load(edges + t) + tl.atomic_add(passed + t, count)
            slot += tl.cumsum(hit.to(tl.int64)) - 1
            fits = hit & (slot < tl.load(edges + t + 1))
            tl.store(where + slot, place, mask=fits)
            tl.store(what + slot, value, mask=fits)


class _Blocks(NamedTuple):
    """Which tensor each program works on, and from which of its elements; int64, on the device."""

    owners: Tensor
    firsts: Tensor
    numels: Tensor


@lru_cache(maxsize=1024)
def _blocks(numels: tuple[int, ...], device: torch.device) -> _Blocks:
    sizes = torch.tensor(numels, dtype=torch.int64)
    per_tensor = (sizes + BLOCK - 1) // BLOCK
    owners = torch.arange(len(numels)).repeat_interleave(per_tensor)
    before = per_tensor.cumsum(0) - per_tensor
    firsts = (torch.arange(owners.numel()) - before[owners]) * BLOCK
    return _Blocks(owners.to(device), firsts.to(device), sizes.to(device))


class _Wanted(NamedTuple):
    """What is wanted of each tensor, and the buffers for its candidates.

    Attributes:
        some, most: bool `[T]` on the device, whether any element is wanted; whether so many that
            no threshold is worth while.
        capacities: candidates that each tensor's buffer holds, on the host.
        starts: where each buffer begins, on the host.
        edges: the same and the end of the last, int64 `[T+1]` on the device.
        total: candidates that all buffers hold.
    """

    some: Tensor
    most: Tensor
    capacities: tuple[int, ...]
    starts: tuple[int, ...]
    edges: Tensor
    total: int


@lru_cache(maxsize=1024)
def _wanted(counts: tuple[int, ...], numels: tuple[int, ...], device: torch.device) -> _Wanted:
    capacities = tuple(
        min(numel, 4 * target(k)) if k else 0 for k, numel in zip(counts, numels, strict=True)
    )
    *starts, total = accumulate(capacities, initial=0)
    edges = torch.tensor([*starts, total], dtype=torch.int64, device=device)
    some = torch.tensor(counts, device=device) > 0
    most = torch.tensor(
        [target(k) >= numel for k, numel in zip(counts, numels, strict=True)], dtype=torch.bool
    )
    return _Wanted(some, most.to(device), capacities, tuple(starts), edges, total)


class _Found(NamedTuple):
    """What a pass left: the buffers, and what the host has read.

    Attributes:
        finite: whether the gradient is; if not, nothing was written.
        passed: how many elements of each tensor reached its threshold.
        low: that threshold, as bits.
        where, what: places and values, those of a tensor from the edge of its buffer on.
    """

    finite: bool
    passed: list[int]
    low: list[int]
    where: Tensor
    what: Tensor


def accumulate_(
    grads: Sequence[Tensor],
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    seed: int = 0,
) -> bool:
    """As `reference.accumulate_`."""
    return _pass(grads, u, v, layout, update, (0,) * len(grads), None, seed).finite


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
    """As `reference.accumulate_select_`; overwrites `thresholds`."""
    counts = tuple(counts)
    found = _pass(grads, u, v, layout, update, counts, thresholds, seed)
    if not found.finite:
        return False, reference.select_(v, layout, (0,) * len(counts), None)
    return True, _select(found, v, layout, counts, thresholds)


def select_(
    v: Tensor, layout: Layout, counts: Sequence[int], thresholds: Tensor | None
) -> SparseBatch:
    """As `reference.select_`; overwrites `thresholds`."""
    counts = tuple(counts)
    found = _pass((), None, v, layout, None, counts, thresholds, 0)
    return _select(found, v, layout, counts, thresholds)


def _pass(
    grads: Sequence[Tensor],
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor | None,
    counts: tuple[int, ...],
    thresholds: Tensor | None,
    seed: int,
) -> _Found:
    """Check, update and collect; then the one read by the host."""
    device = v.device
    blocks, wanted = _blocks(layout.numels, device), _wanted(counts, layout.numels, device)
    low = _bits(wanted, thresholds)
    # The last element counts gradients that are not finite.
    report = torch.zeros(len(counts) + 1, dtype=torch.int64, device=device)
    where = torch.empty(wanted.total, dtype=torch.int64, device=device)
    what = torch.empty(wanted.total, device=device)
    addresses = uploaded([g.data_ptr() for g in grads], device)
    grid = (blocks.owners.numel(),)
    if grid[0] and update is not None:
        _check[grid](addresses, *blocks, report[-1:], BLOCK=BLOCK)
    if grid[0]:
        rows = v if update is None else update.to(device, non_blocking=True)
        states = [_raw(state) for state in (v if u is None else u, v)]
        memory = (addresses, *states, *blocks, layout.table, rows, low)
        _advance[grid](
            *(*memory, wanted.edges, report, where, what, report[-1:], _signed(seed)),
            UPDATE=update is not None,
            MOMENTUM=u is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    read: list[int] = torch.cat([report, low]).tolist()
    return _Found(read[len(counts)] == 0, read[: len(counts)], read[len(counts) + 1 :], where, what)


def _raw(state: Tensor) -> Tensor:
    return state.view(torch.int16) if state.dtype == torch.bfloat16 else state


def _signed(seed: int) -> int:
    """The same 32 bits as a signed number: Triton would pass a larger one in 64 bits."""
    return seed - (seed >> 31 << 32)


def _bits(wanted: _Wanted, thresholds: Tensor | None) -> Tensor:
    """The thresholds as int32 bits: what is remembered, or 1 to let all elements but zeros pass."""
    if thresholds is None:
        return torch.where(wanted.some, 1, NOTHING).int()
    known = torch.where((thresholds > 0) & ~wanted.most, thresholds.view(torch.int32), 1)
    return torch.where(wanted.some, known, NOTHING).int()


def _select(
    found: _Found,
    v: Tensor,
    layout: Layout,
    counts: tuple[int, ...],
    thresholds: Tensor | None,
) -> SparseBatch:
    """The counts[t] largest candidates of each tensor; the next thresholds from the others."""
    wanted = _wanted(counts, layout.numels, v.device)
    bad = [
        t
        for t, (n, k) in enumerate(zip(found.passed, counts, strict=True))
        if (n < k and found.low[t] > 1) or n > wanted.capacities[t]
    ]
    passed = tuple(0 if t in bad else n for t, n in enumerate(found.passed))
    slots = runs(wanted.starts, passed, v.device)
    batch, ranked = trim(Candidates(found.where[slots], found.what[slots], passed), layout, counts)
    if thresholds is not None:
        remember_(thresholds, ranked, passed, counts)
        restart_(thresholds, v, layout, counts, bad)
    return replace(batch, v, layout, counts, bad) if bad else batch
