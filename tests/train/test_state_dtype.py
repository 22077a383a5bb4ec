"""A bfloat16 memory, with every pattern: what it loses on the way is rounding, and zero in the mean."""

from typing import Any

import pytest
import torch
from torch import Tensor

import dgc
from dgc.config import PATTERNS
from dgc.core.layout import Layout
from dgc.errors import ConfigError, StateError
from dgc.train import checkpoint
from dgc.train.bucket import Row, updates
from dgc.train.memory import Memory
from dgc.train.step import send_
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, train, wrap

HALF: dict[str, Any] = {"density": 0.1, "min_selected": 1, "state_dtype": torch.bfloat16}
STATIC = [pattern for pattern in PATTERNS if pattern != "auto"]  # which chooses by the clock


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16"])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"state_dtype is .* must be one of"):
        dgc.DGC(state_dtype=dtype)


def test_it_takes_half_the_bytes() -> None:
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        memory = Memory(Layout.of([1000]), dgc.DGC(state_dtype=dtype))
        sizes[dtype] = sum(state.nbytes for state in memory.tensors(0).values())
    assert sizes == {torch.float32: 8000, torch.bfloat16: 4000}


def test_small_gradients_are_not_lost() -> None:
    """A constant gradient, 1000 steps: rounding to nearest would stop the residual at 256 of them."""
    numel, steps, gradient = 20_000, 1000, 3e-4
    memory = Memory(
        Layout.of([numel]), dgc.DGC(density=1e-6, min_selected=1, state_dtype=torch.bfloat16)
    )
    row = updates([Row()])
    total = 0.0
    for step in range(steps):
        memory.begin(step)
        _, sent = send_(memory, [torch.full((numel,), gradient)], row, 1e-6, [True])
        total += sent.values.double().sum().item()
    total += memory.v.double().sum().item()
    assert total == pytest.approx(numel * steps * gradient, rel=0.001)


def step_of(
    model: Toy, optimizer: dgc.DistributedOptimizer, step: int, bad: bool = False
) -> tuple[Tensor, Tensor]:
    """Train; what this rank let in, and the mean that arrived."""
    found = gradients(step, optimizer.comm.rank)
    entered = torch.cat([g.view(-1) for g in found])
    optimizer.zero_grad()
    model.loss([g * torch.nan if bad else g for g in found]).backward()
    optimizer.synchronize()
    arrived = torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])
    optimizer.step()
    return entered, arrived


def residual(optimizer: dgc.DistributedOptimizer, model: Toy) -> Tensor:
    memory = optimizer.state_dict()["memory"]
    assert all(t.dtype == torch.bfloat16 for states in memory.values() for t in states.values())
    return torch.cat([memory[name]["v"].float() for name, _ in model.named_parameters()])


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("pattern", STATIC)
def test_conservation_with_every_pattern(pattern: str, bits: int) -> None:
    """Σ sent + Σ residuals − Σ entered is the rounding of each write: under 2^-7 of what is there."""
    changes = {"pattern": pattern, "value_bits": bits, "momentum_correction": False}
    config = dgc.DGC(**HALF, **changes, fold_lr=False)
    steps, ranks, writes = 12, 4, 3  # accumulate, release, and what an owner drops

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = Toy()
        optimizer = wrap(model, config, comm)
        entered, sent = torch.zeros_like(flat(model)), torch.zeros_like(flat(model))
        largest = torch.zeros_like(entered)
        for step in range(steps):
            came, arrived = step_of(model, optimizer, step)
            entered, sent = entered + came, sent + arrived
            largest = torch.maximum(largest, residual(optimizer, model).abs() + came.abs())
        return entered, sent, residual(optimizer, model), largest

    found = run_ranks(ranks, body, per_host=2)
    entered, _, kept, largest = (sum(each) for each in zip(*found, strict=True))
    error = ranks * found[0][1] + kept - entered
    assert bool((error.abs() <= steps * writes * 2**-7 * largest).all())
    assert error.abs().mean() <= 2**-7 * largest.mean()  # signs differ, so most of it cancels
    assert error.abs().max() > 0


@pytest.mark.parametrize("pattern", STATIC)
def test_resume_is_exact(pattern: str) -> None:
    config = dgc.DGC(**HALF, pattern=pattern)

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        models = Toy(), Toy()
        optimizers = [wrap(model, config, comm) for model in models]
        train(models[0], optimizers[0], range(5))
        models[1].load_state_dict(models[0].state_dict())
        tensors = checkpoint.to_tensors(optimizers[0].state_dict())
        optimizers[1].load_state_dict(checkpoint.from_tensors(tensors))
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, range(5, 12))
        ends = [
            torch.cat([flat(m), residual(o, m)]) for m, o in zip(models, optimizers, strict=True)
        ]
        return ends[0], ends[1]

    for one, other in run_ranks(4, body, per_host=2):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pattern", ["all-gather", "dense", "shared-indices", "re-selecting"])
def test_a_skipped_step_puts_back_what_was_sent(pattern: str) -> None:
    config = dgc.DGC(**HALF, pattern=pattern, momentum_correction=False, fold_lr=False)

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        model = Toy()
        optimizer = wrap(model, config, comm)
        train(model, optimizer, range(3))
        before = residual(optimizer, model)
        came, _ = step_of(model, optimizer, 3, bad=comm.rank == 1)
        assert optimizer.stats()["skipped_steps"] == 1
        return residual(optimizer, model), before + (came if comm.rank != 1 else 0)

    for found, wanted in run_ranks(4, body, per_host=2):
        assert bool(((found - wanted).abs() <= 3 * 2**-7 * (found.abs() + wanted.abs() + 1)).all())


def test_ranks_round_independently() -> None:
    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        optimizer = wrap(model, dgc.DGC(**HALF, fold_lr=True), comm)
        train(model, optimizer, range(3), lambda step, rank: gradients(step, 0))
        return residual(optimizer, model)

    one, two = run_ranks(2, body)
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=0.1, atol=0.1)


def test_a_state_of_another_dtype_is_refused() -> None:
    exact, half = (
        wrap(Toy(), dgc.DGC(state_dtype=d), None) for d in (torch.float32, torch.bfloat16)
    )
    for one, other in ((exact, half), (half, exact)):
        with pytest.raises(StateError, match=r"'7 torch\.b?float\d+'.* here it is .*load it with"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("new_size", [1, 3])
def test_resize_keeps_the_mean_and_the_dtype(new_size: int) -> None:
    def body(comm: ThreadCommunicator) -> dict[str, Any]:
        model = Toy()
        optimizer = wrap(model, dgc.DGC(**HALF), comm)
        train(model, optimizer, range(4))
        return optimizer.state_dict()

    old = run_ranks(4, body)
    new = [checkpoint.resize(old, rank, new_size) for rank in range(new_size)]
    for name, tensors in old[0]["memory"].items():
        for key in tensors:
            assert new[0]["memory"][name][key].dtype == torch.bfloat16
            before = sum(s["memory"][name][key].double() for s in old) / 4
            after = sum(s["memory"][name][key].double() for s in new) / new_size
            scale = sum(s["memory"][name][key].double().abs() for s in old) / 4
            assert bool(((after - before).abs() <= 2**-8 * new_size * scale).all())
