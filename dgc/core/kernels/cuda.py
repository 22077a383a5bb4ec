"""The kernels on a GPU: Triton's, and of torch what sorts and sums the few candidates.

The host never waits for the device: it launches the same work whatever the values are, and what it
uploads are short tables. Whether a gradient is finite, and how many elements of a tensor reached
their threshold, stays on the device. A tensor where too few did, or more than its buffer holds, is
collected again by its exact threshold; where there is no such tensor these passes return at once.

Gradients may be given as a table of their addresses, and a seed as a tensor: what a step changes is
then on the device, and the same work can be recorded and run again.

So a selection has as many slots as elements are wanted. A slot that was not filled, because fewer
elements are not zero or a gradient is not finite, has the index 0 and the value 0.
Results equal those of `reference` bit for bit. Shapes: T tensors, n elements, B blocks.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.core.kernels import cuda_kernels as triton_kernels
from dgc.core.kernels import cuda_steps, decode_torch, trim_kernels
from dgc.core.kernels.cuda_radix import find_kth_
from dgc.core.kernels.cuda_tables import BLOCK, Blocks, blocks_of, uploaded
from dgc.core.kernels.cuda_trim import Candidates, Wanted, remember_, room, target, trim
from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch
from dgc.core.tables import Table

scatter_add_ = decode_torch.add_values_
precondition_, decay_ = cuda_steps.precondition_, cuda_steps.decay_

WARPS = 8
"""Of a program that updates the state: with `BLOCK` the fastest of what was tried on an H100."""


@Table
def _wanted(counts: tuple[int, ...], numels: tuple[int, ...], device: torch.device) -> Wanted:
    each = list(zip(counts, numels, strict=True))
    capacities = [room(k, numel) for k, numel in each]
    aims = [min(target(k), numel) for k, numel in each]
    *starts, total = accumulate(capacities, initial=0)
    rows = torch.tensor([counts, aims, capacities, starts], dtype=torch.int64).view(4, -1)
    edges = torch.tensor([*starts, total], dtype=torch.int64)
    wanted, aimed, rooms, first = rows.to(device).unbind()
    blocks = blocks_of(tuple(capacities), device)
    return Wanted(wanted, aimed, rooms, first, edges.to(device), blocks, total)


class _Found(NamedTuple):
    """What a pass left, on the device.

    Attributes:
        bad: int64 `[1]`, whether a gradient is not finite; then nothing was written.
        passed: int64 `[T]`, how many elements of each tensor reached its threshold.
        where, what: places and values, those of a tensor from the edge of its buffer on.
    """

    bad: Tensor
    passed: Tensor
    where: Tensor
    what: Tensor

    @property
    def finite(self) -> Tensor:
        """Bool `[]`."""
        return self.bad[0] == 0


def squared_norm(grads: Sequence[Tensor]) -> float:
    """As `reference.squared_norm`, to rounding, in a few launches; the host waits for it."""
    norms = torch._foreach_norm(list(grads), 2, dtype=torch.float64)
    return float(torch.stack(norms).square().sum())


def accumulate_(
    grads: Sequence[Tensor] | Tensor,
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    seed: int | Tensor = 0,
) -> Tensor:
    """As `reference.accumulate_`; bool `[]`."""
    return _pass(grads, u, v, layout, update, (0,) * len(layout.numels), None, seed).finite


def accumulate_select_(
    grads: Sequence[Tensor] | Tensor,
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor,
    counts: Sequence[int],
    thresholds: Tensor | None,
    seed: int | Tensor = 0,
) -> tuple[Tensor, SparseBatch]:
    """As `reference.accumulate_select_`, with slots; overwrites `thresholds`."""
    found = _pass(grads, u, v, layout, update, tuple(counts), thresholds, seed)
    return found.finite, _select(found, v, layout, tuple(counts), thresholds)


def select_(
    v: Tensor, layout: Layout, counts: Sequence[int], thresholds: Tensor | None
) -> SparseBatch:
    """As `reference.select_`, with slots; overwrites `thresholds`."""
    found = _pass((), None, v, layout, None, tuple(counts), thresholds, 0)
    return _select(found, v, layout, tuple(counts), thresholds)


def release_(
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    batch: SparseBatch,
    sent: Tensor,
    seed: int | Tensor = 0,
) -> Tensor | None:
    """As `reference.release_`, of the slots that are filled; others return any element."""
    places = layout.places(batch.indices, batch.counts)
    cleared = None if u is None else u.index_select(0, places)
    _subtract(u, v, places, batch.values, sent, seed)
    return cleared


def add_(v: Tensor, places: Tensor, values: Tensor, seed: int | Tensor = 0) -> None:
    """As `reference.add_`; places with the value 0 may be any."""
    _subtract(None, v, places, values, -values, seed)


def _subtract(
    u: Tensor | None, v: Tensor, places: Tensor, held: Tensor, sent: Tensor, seed: int | Tensor
) -> None:
    count = places.numel()
    states = _raw(v if u is None else u), _raw(v)
    if count:
        triton_kernels.subtract[(-(-count // BLOCK),)](
            *(*states, places, held, sent, count, _there(seed, v.device)),
            MASKING=u is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


def _pass(
    grads: Sequence[Tensor] | Tensor,
    u: Tensor | None,
    v: Tensor,
    layout: Layout,
    update: Tensor | None,
    counts: tuple[int, ...],
    thresholds: Tensor | None,
    seed: int | Tensor,
) -> _Found:
    """Check, update and collect, and collect again what was not collected well."""
    device = v.device
    blocks, wanted = blocks_of(layout.numels, device), _wanted(counts, layout.numels, device)
    # The last element counts gradients that are not finite.
    report = torch.zeros(len(counts) + 1, dtype=torch.int64, device=device)
    where = torch.empty(wanted.total, dtype=torch.int64, device=device)
    what = torch.empty(wanted.total, device=device)
    addresses = grads
    if not isinstance(addresses, Tensor):
        addresses = uploaded([g.data_ptr() for g in addresses], device)
    grid, passed, bad = (blocks.owners.numel(),), report[:-1], report[-1:]
    found = _Found(bad, passed, where, what)
    if not grid[0]:
        return found
    low = torch.empty(len(counts), dtype=torch.int32, device=device)
    guess = low if thresholds is None else thresholds
    trim_kernels.start[(len(counts),)](
        *(guess, wanted.counts, wanted.aims, blocks.numels, low), KNOWN=thresholds is not None
    )
    if update is not None:
        triton_kernels.check[grid](addresses, *blocks[:3], bad, BLOCK=BLOCK)
    rows = v if update is None else update.to(device, non_blocking=True)
    states = [_raw(state) for state in (v if u is None else u, v)]
    memory = (addresses, *states, *blocks[:3], layout.table, rows, low)
    triton_kernels.advance[grid](
        *(*memory, wanted.edges, passed, where, what, bad, _there(seed, device)),
        UPDATE=update is not None,
        MOMENTUM=u is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    if wanted.total:
        _collect_again_(found, low, _raw(v), layout, blocks, wanted)
    return found


def _raw(state: Tensor) -> Tensor:
    return state.view(torch.int16) if state.dtype == torch.bfloat16 else state


def _there(seed: int | Tensor, device: torch.device) -> Tensor:
    return seed if isinstance(seed, Tensor) else uploaded([seed], device)


def _collect_again_(
    found: _Found, low: Tensor, v: Tensor, layout: Layout, blocks: Blocks, wanted: Wanted
) -> None:
    """Where too few reached low[t], or too many, collect the aims[t] largest, of equal ones the first."""
    grid, tensors = (blocks.owners.numel(),), (low.numel(),)
    again, exact, rank = torch.empty(3, *tensors, dtype=torch.int64, device=v.device).unbind()
    trim_kernels.judge[tensors](
        *(low, wanted.counts, wanted.aims, wanted.capacities, found.bad, found.passed),
        *(again, exact, rank),
    )
    ties = find_kth_(v, blocks, layout.table, again, exact, rank)
    triton_kernels.collect[grid](
        *(v, *blocks[:3], layout.table, again, exact, rank, *ties, blocks.leads),
        *(wanted.edges, found.passed, found.where, found.what),
        BLOCK=BLOCK,
    )


def _select(
    found: _Found,
    v: Tensor,
    layout: Layout,
    counts: tuple[int, ...],
    thresholds: Tensor | None,
) -> SparseBatch:
    """The counts[t] largest candidates of each tensor; the next thresholds from the others."""
    wanted = _wanted(counts, layout.numels, v.device)
    candidates = Candidates(found.where, found.what, found.passed)
    batch, ranked = trim(candidates, wanted, layout, counts)
    if thresholds is not None:
        remember_(thresholds, ranked, found.passed, wanted, found.bad)
    return batch
