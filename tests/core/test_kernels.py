"""Every implementation gives the reference's bits; the reference is held to slow float64 loops."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dgc.core import kernels
from dgc.core.kernels import cpu, reference
from dgc.core.layout import Layout
from dgc.core.sparse import SparseBatch
from tests.core.implementations import Implementation

NUMELS = (1, 3, 1024, 1025, 20_001, 64, 90_000, 2)
LAYOUT = Layout.of(NUMELS)
COUNTS = tuple(max(1, n // 100) for n in NUMELS)
DTYPES = (torch.float32, torch.bfloat16)
ROWS = torch.tensor([[0.9, 0.37, 0.1, 0.0], [0.8, 1.0, 1.0, 1.0]]).repeat(4, 1)


def gaussian(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYOUT.offsets[-1], generator=generator) * scale


def same_batch(found: SparseBatch, expected: SparseBatch) -> None:
    found = found.filled()  # a GPU's has slots
    assert found.counts == expected.counts
    assert found.numels == expected.numels
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert torch.equal(found.values.cpu().view(torch.int32), expected.values.view(torch.int32))


def edge_tensors() -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Flat tensors of `LAYOUT` and how many are wanted of each."""
    n = LAYOUT.offsets[-1]
    ties = torch.arange(n).remainder(7).float() * torch.tensor([1.0, -1.0]).repeat(n // 2 + 1)[:n]
    few = torch.zeros(n)
    few[:: n // 100] = 1.0
    wide = gaussian(1) * torch.logspace(-30, 30, n)[torch.randperm(n)]
    return {
        "gaussian": (gaussian(1), COUNTS),
        "everything": (gaussian(1), NUMELS),
        "nothing": (gaussian(1), (0,) * len(NUMELS)),
        "zeros": (torch.zeros(n), COUNTS),
        "equal": (torch.full((n,), -2.5), COUNTS),
        "ties": (ties, COUNTS),
        "few": (few, COUNTS),
        "denormal": (gaussian(1, 1e-41), COUNTS),
        "huge": (gaussian(1, 1e38).clamp(-3e38, 3e38), COUNTS),
        "wide": (wide, COUNTS),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", edge_tensors())
def test_selection_equals_the_reference(
    name: str, dtype: torch.dtype, implementation: Implementation
) -> None:
    v, counts = edge_tensors()[name]
    v = v.to(dtype)
    expected = reference.select_(v, LAYOUT, counts, None)
    state, layout = implementation.to(v), implementation.layout(NUMELS)
    thresholds = implementation.to(torch.zeros(len(NUMELS)))
    for guess in (None, thresholds, thresholds):  # none, unknown ones, remembered ones
        same_batch(implementation.module.select_(state, layout, counts, guess), expected)
    assert torch.equal(state.cpu(), v)


@pytest.mark.parametrize("guess", [1e-45, 1e-20, 0.5, 3.0, 1e30])
def test_a_wrong_threshold_changes_nothing(guess: float, implementation: Implementation) -> None:
    v = gaussian(2)
    expected = reference.select_(v, LAYOUT, COUNTS, None)
    thresholds = implementation.to(torch.full((len(NUMELS),), guess))
    layout = implementation.layout(NUMELS)
    found = implementation.module.select_(implementation.to(v), layout, COUNTS, thresholds)
    same_batch(found, expected)


def test_reference_selects_by_magnitude_and_first_of_equals() -> None:
    v = edge_tensors()["ties"][0]
    batch = reference.select_(v, LAYOUT, COUNTS, None)
    for sparse, dense, k in zip(batch.split(), LAYOUT.split(v), COUNTS, strict=True):
        ranked = sorted(range(dense.numel()), key=lambda i: (-abs(dense[i].item()), i))
        nonzero = [i for i in ranked[:k] if dense[i] != 0]
        assert sparse.indices.tolist() == sorted(nonzero)
        assert torch.equal(sparse.values, dense[sparse.indices])
        if dense.numel() > 2000:
            break


def slow_update(g: float, u: float, v: float, row: list[float]) -> tuple[float, float]:
    momentum, gain, lr, nesterov = row
    entered = gain * g
    if nesterov:
        u = momentum * (u + entered)
        return u, v + lr * (u + entered)
    u = momentum * u + entered
    return u, v + lr * u


def gradients(seed: int) -> list[Tensor]:
    return [grad.clone() for grad in LAYOUT.split(gaussian(seed))]


def test_reference_update_follows_the_formula() -> None:
    layout = Layout.of([3, 2])
    u, v = torch.tensor([0.5, -1, 2, 3, 0]), torch.tensor([1.0, 2, 3, 4, 5])
    grads = [torch.tensor([0.25, -0.5, 4]), torch.tensor([1.5, -3])]
    rows = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.8, 2.0, 3.0, 1.0]])
    flat = torch.cat(grads).tolist()
    owners = [0, 0, 0, 1, 1]
    expected = [
        slow_update(flat[i], u[i].item(), v[i].item(), rows[owners[i]].tolist()) for i in range(5)
    ]
    assert reference.accumulate_(grads, u, v, layout, rows)
    torch.testing.assert_close(u.double(), torch.tensor([e[0] for e in expected]).double())
    torch.testing.assert_close(v.double(), torch.tensor([e[1] for e in expected]).double())


class Step(NamedTuple):
    """What a few steps leave behind."""

    u: Tensor | None
    v: Tensor
    batches: list[SparseBatch]
    cleared: list[Tensor | None]
    """Of the elements that were selected; a GPU's selection has slots without one."""


def steps(
    implementation: Implementation, momentum: bool, scales: Sequence[float], dtype: torch.dtype
) -> Step:
    module, layout = implementation.module, implementation.layout(NUMELS)
    u = implementation.to(gaussian(3).to(dtype)) if momentum else None
    v = implementation.to(gaussian(4).to(dtype))
    thresholds = implementation.to(torch.zeros(len(NUMELS)))
    batches, cleared = [], []
    for step, scale in enumerate(scales):
        grads = [implementation.to(grad * scale) for grad in gradients(step)]
        seeds = kernels.seed_of(step, 0), kernels.seed_of(step, 1)
        finite, batch = module.accumulate_select_(
            grads, u, v, layout, ROWS, COUNTS, thresholds, seeds[0]
        )
        assert finite
        was = module.release_(u, v, layout, batch, batch.values * 0.7, seeds[1])
        batches.append(batch)
        cleared.append(was if was is None else was[batch.values != 0].cpu())
    return Step(u if u is None else u.cpu(), v.cpu(), batches, cleared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [True, False])
def test_steps_equal_the_reference_to_the_bit(
    momentum: bool, dtype: torch.dtype, implementation: Implementation
) -> None:
    # From one step to the next the gradients grow or shrink a thousandfold, or vanish.
    scales = (1.0, 1.0, 1e3, 1.0, 1e-3, 0.0)
    expected = steps(Implementation(reference, "cpu"), momentum, scales, dtype)
    found = steps(implementation, momentum, scales, dtype)
    for batch, batch_expected in zip(found.batches, expected.batches, strict=True):
        same_batch(batch, batch_expected)
    assert torch.equal(found.v, expected.v)
    assert (found.u is None) == (expected.u is None)
    assert found.u is None or torch.equal(found.u, expected.u)
    for was, was_expected in zip(found.cleared, expected.cleared, strict=True):
        assert (was is None) == (was_expected is None) == (not momentum)
        assert was is None or torch.equal(was, was_expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [True, False])
def test_update_alone_equals_the_reference_to_the_bit(
    momentum: bool, dtype: torch.dtype, implementation: Implementation
) -> None:
    states = []
    for module, device in (Implementation(reference, "cpu"), implementation):
        u = gaussian(3).to(device, dtype) if momentum else None
        v = gaussian(4).to(device, dtype)
        grads = [grad.to(device) for grad in gradients(0)]
        assert module.accumulate_(grads, u, v, Layout.of(NUMELS, device), ROWS, 0x9ABCDEF0)
        states.append((u if u is None else u.cpu(), v.cpu()))
    (u, v), (u_found, v_found) = states
    assert torch.equal(v, v_found)
    assert not momentum or torch.equal(u, u_found)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_a_sudden_change_of_scale_changes_nothing(
    scale: float, implementation: Implementation
) -> None:
    module, layout = implementation.module, implementation.layout(NUMELS)
    thresholds = implementation.to(torch.zeros(len(NUMELS)))
    module.select_(implementation.to(gaussian(1)), layout, COUNTS, thresholds)
    v = gaussian(2, scale)
    expected = reference.select_(v, LAYOUT, COUNTS, None)
    same_batch(module.select_(implementation.to(v), layout, COUNTS, thresholds), expected)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("tensor", [0, 4, 7])
def test_nothing_enters_if_an_element_is_not_finite(
    bad: float, tensor: int, implementation: Implementation
) -> None:
    module, layout = implementation.module, implementation.layout(NUMELS)
    u, v = implementation.to(gaussian(3)), implementation.to(gaussian(4))
    thresholds = implementation.to(torch.full((len(NUMELS),), 0.5))
    grads = [implementation.to(grad) for grad in gradients(5)]
    grads[tensor][-1] = bad
    finite, batch = module.accumulate_select_(grads, u, v, layout, ROWS, COUNTS, thresholds)
    assert not finite
    batch = batch.filled()
    assert batch.counts == (0,) * len(NUMELS)
    assert batch.indices.numel() == batch.values.numel() == 0
    assert torch.equal(u.cpu(), gaussian(3))
    assert torch.equal(v.cpu(), gaussian(4))
    assert thresholds.tolist() == [0.5] * len(NUMELS)


@pytest.mark.parametrize("masking", [True, False])
def test_release_keeps_what_was_not_sent(masking: bool) -> None:
    u, v = gaussian(3), gaussian(4)
    batch = kernels.select_(v, LAYOUT, COUNTS, None)
    cleared = kernels.release_(u, v, LAYOUT, batch, batch.values * 0.5, masking)
    starts = torch.tensor(LAYOUT.offsets[:-1]).repeat_interleave(torch.tensor(batch.counts))
    chosen = torch.zeros_like(v, dtype=torch.bool)
    chosen[batch.indices + starts] = True
    assert torch.equal(v, torch.where(chosen, gaussian(4) * 0.5, gaussian(4)))
    assert torch.equal(u, gaussian(3).masked_fill(chosen & masking, 0.0))
    assert (cleared is None) == (not masking)
    assert cleared is None or torch.equal(cleared, gaussian(3)[chosen])


def test_gradients_of_any_layout_and_dtype() -> None:
    layout = Layout.of([6, 6, 6])
    base = torch.arange(6.0).reshape(2, 3) - 2
    grads = [base.t().contiguous().t(), base.bfloat16(), base.half().requires_grad_()]
    v = torch.zeros(18)
    assert kernels.accumulate_(grads, None, v, layout, torch.ones(3, 4))
    assert torch.equal(v, base.flatten().repeat(3))


def test_squared_norm(implementation: Implementation) -> None:
    grads = gradients(6)
    expected = math.fsum(x * x for grad in grads for x in grad.tolist())
    on_device = [implementation.to(grad) for grad in grads]
    norm = implementation.module.squared_norm(on_device)
    assert norm == pytest.approx(expected, rel=1e-12)
    on_device[3][2] = float("nan")
    assert math.isnan(implementation.module.squared_norm(on_device))


def test_squared_norm_does_not_depend_on_threads() -> None:
    before, norms = torch.get_num_threads(), set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        norms.add(kernels.squared_norm(gradients(6)))
    torch.set_num_threads(before)
    assert len(norms) == 1


def test_an_empty_bucket_and_empty_tensors(implementation: Implementation) -> None:
    module, layout = implementation.module, implementation.layout([0, 2, 0])
    v = implementation.to(torch.tensor([1.0, -2.0]))
    thresholds = implementation.to(torch.zeros(3))
    for _ in range(2):
        batch = module.select_(v, layout, (0, 1, 0), thresholds)
        assert (batch.counts, batch.indices.tolist()) == ((0, 1, 0), [1])
    nothing = implementation.to(torch.empty(0))
    assert module.select_(nothing, implementation.layout([]), (), None).counts == ()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_threads_work_in_a_forked_process() -> None:
    v = gaussian(1)
    cpu.select_(v, LAYOUT, COUNTS, None)
    pid = os.fork()
    if pid == 0:
        ok = cpu.select_(v, LAYOUT, COUNTS, None).counts == COUNTS
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_remembered_thresholds_leave_few_tensors_to_collect_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again: list[int] = []
    exactly = cpu._replaced
    monkeypatch.setattr(
        cpu, "_replaced", lambda f, b, few: (again.append(few.size), exactly(f, b, few))[1]
    )
    u, v, thresholds = torch.zeros(LAYOUT.offsets[-1]), gaussian(0), torch.zeros(len(NUMELS))
    for step in range(40):
        _, batch = cpu.accumulate_select_(gradients(step), u, v, LAYOUT, ROWS, COUNTS, thresholds)
        cpu.release_(u, v, LAYOUT, batch, batch.values)
    assert sum(again) <= 0.1 * 40 * len(NUMELS)


def test_a_gpu_is_current_where_its_kernels_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be the one of the tensors."""
    pytest.importorskip("triton")
    from dgc.core.kernels import cuda

    current = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    second = torch.device("cuda", 1)
    with kernels._for(second) as passes:
        assert passes is cuda
        assert current == [second]
    with kernels._for(torch.device("cpu")) as passes:
        assert passes is cpu
        assert current == []
