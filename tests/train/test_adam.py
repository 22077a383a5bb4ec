"""Adam and AdamW with momentum correction: their steps are accumulated and sent."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import dgc
from dgc.errors import ConfigError, StateError
from dgc.train.adam import UNIT
from dgc.train.checkpoint import resize
from tests.oracle import AdamWOracle, Sgd
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, train

# With a small eps all steps would be ±1 at first, and which of them are sent would be rounding's.
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 0.1, "weight_decay": 0.1}
SMALL: dict[str, Any] = {"density": 0.1, "min_selected": 1, "value_bits": 32}
STEPS = 15


def wrap(
    model: Toy, config: dgc.DGC, comm: Any = None, kind: Any = torch.optim.AdamW, **options: Any
) -> dgc.DistributedOptimizer:
    inner = kind(model.parameters(), **{**OPTIONS, **options})
    return dgc.DistributedOptimizer(inner, model.named_parameters(), config, comm)


def rate(step: int) -> float:
    return 0.02 / (1 + step % 4)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"fold_lr": True},
        {"clip_norm": 3.0},
        {"warmup_steps": 6},
        {"local_accumulation": False},
    ],
    ids=str,
)
def test_equals_the_oracle(variant: dict[str, Any], workers: int) -> None:
    config = dgc.DGC(**{**SMALL, **variant})

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        optimizer = wrap(model, config, comm)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = rate(step)
            train(model, optimizer, range(step, step + 1))
        return flat(model)

    found = run_ranks(workers, body)
    named = {name: p.detach().double().view(-1) for name, p in Toy().named_parameters()}
    sgd = {name: Sgd(momentum=0.0, weight_decay=0.1) for name in named}
    oracle = AdamWOracle({n: p.tolist() for n, p in named.items()}, sgd, config, workers)
    for step in range(STEPS):
        for each in sgd.values():
            each.lr = rate(step)
        drawn = [gradients(step, rank) for rank in range(workers)]
        oracle.step(
            [
                {n: g.double().view(-1).tolist() for n, g in zip(named, own, strict=True)}
                for own in drawn
            ]
        )
    wanted = torch.tensor([x for name in named for x in oracle.params[name]], dtype=torch.float64)
    for each in found:
        assert torch.equal(each, found[0])
    assert (found[0] - wanted).norm() <= 5e-6 * wanted.norm()


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_density_one_on_one_rank_is_adam_without_its_first_moment(
    kind: Any, options: dict[str, Any]
) -> None:
    model, dense = Toy(), Toy()
    config = dgc.DGC(density=1.0, value_bits=32)
    train(model, wrap(model, config, kind=kind, **options), range(STEPS))
    optimizer = kind(dense.parameters(), **{**OPTIONS, **options, "betas": (0.0, 0.99)})
    for step in range(STEPS):
        optimizer.zero_grad()
        dense.loss(gradients(step, 0)).backward()
        optimizer.step()
    torch.testing.assert_close(flat(model), flat(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_excluded_parameters_are_trained_by_the_optimizer(kind: Any) -> None:
    config = dgc.DGC(**SMALL, exclude=("*",))

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        train(model, wrap(model, config, comm, kind, maximize=True), range(STEPS))
        return flat(model)

    dense = Toy()
    optimizer = kind(dense.parameters(), **OPTIONS, maximize=True)
    for step in range(STEPS):
        both = zip(gradients(step, 0), gradients(step, 1), strict=True)
        for param, pair in zip(dense.parameters(), both, strict=True):
            param.grad = torch.stack(pair).mean(0)
        optimizer.step()
    torch.testing.assert_close(run_ranks(2, body)[0], flat(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 4, 32])
def test_conservation(bits: int) -> None:
    """Σ sent + residual = Σ lr·g/√ŝ, on each rank."""
    config = dgc.DGC(**{**SMALL, "value_bits": bits}, fold_lr=True)

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        model = Toy()
        optimizer = wrap(model, config, comm)
        second = torch.zeros_like(flat(model))
        entered, sent = second, second
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = rate(step)
            g = torch.cat([g.view(-1) for g in gradients(step, comm.rank)])
            second = 0.99 * second + 0.01 * g * g
            entered = entered + rate(step) * g / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 0.1)
            optimizer.zero_grad()
            model.loss(gradients(step, comm.rank)).backward()
            optimizer.synchronize()
            arrived = [p.grad.view(-1) for p in model.parameters() if p.grad is not None]
            sent = sent + torch.cat(arrived) / UNIT
            optimizer.step()
        memory = optimizer.state_dict()["memory"]
        residual = torch.cat([memory[name]["v"] for name, _ in model.named_parameters()])
        return entered - residual, sent

    results = run_ranks(2, body)
    wanted = sum(each[0] for each in results) / 2
    assert (results[0][1] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_clipping_after_the_exchange_changes_nothing() -> None:
    """What arrives is a step: its norm is no gradient's."""
    models = [Toy(), Toy()]
    for model, clips in zip(models, (False, True), strict=True):
        optimizer = wrap(model, dgc.DGC(**SMALL))
        for step in range(STEPS):
            optimizer.zero_grad()
            model.loss(gradients(step, 0)).backward()
            optimizer.synchronize()
            if clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
    assert torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_gradient_whose_square_is_not_finite_leaves_no_trace(bad: float) -> None:
    models = [Toy(), Toy()]
    for model, fails in zip(models, (False, True), strict=True):
        optimizer = wrap(model, dgc.DGC(**SMALL))
        train(model, optimizer, range(2))
        if fails:
            before = flat(model)
            optimizer.zero_grad()
            model.loss([torch.full_like(g, bad) for g in gradients(0, 0)]).backward()
            optimizer.step()
            assert torch.equal(before, flat(model))
            assert optimizer.stats()["skipped_steps"] == 1
        train(model, optimizer, range(2, 6))
    assert torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_move(dtype: torch.dtype) -> None:
    model, single = Toy().to(dtype), Toy()
    for each in (model, single):
        train(each, wrap(each, dgc.DGC(**SMALL), lr=0.5), range(6))
    moved = [flat(each).float() - flat(Toy()) for each in (model, single)]
    assert (moved[0] - moved[1]).norm() <= 0.1 * moved[1].norm()


def test_the_optimizer_keeps_nothing_for_compressed_parameters() -> None:
    """Beside the parameters: v and the second moment, as much as Adam alone."""
    model = Toy()
    optimizer = wrap(model, dgc.DGC(**SMALL))
    train(model, optimizer, range(2))
    assert not optimizer.optimizer.state
    assert {key for each in optimizer.state_dict()["memory"].values() for key in each} == {"v"}
    assert all(p.grad is not None for p in model.parameters())


def test_resuming_is_exact() -> None:
    config = dgc.DGC(density=0.1, min_selected=1, exclude=("a_bias",))
    whole, first, second = Toy(), Toy(), Toy()
    train(whole, wrap(whole, config), range(10))
    saved = wrap(first, config)
    train(first, saved, range(5))
    second.load_state_dict(first.state_dict())
    resumed = wrap(second, config)
    resumed.load_state_dict(saved.state_dict())
    train(second, resumed, range(5, 10))
    assert torch.equal(flat(whole), flat(second))


def test_training_goes_on_with_another_number_of_ranks() -> None:
    config = dgc.DGC(**SMALL)

    def before(comm: ThreadCommunicator) -> dict[str, Any]:
        model = Toy()
        optimizer = wrap(model, config, comm)
        train(model, optimizer, range(3))
        return optimizer.state_dict()

    states = run_ranks(2, before)

    def after(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        optimizer = wrap(model, config, comm)
        optimizer.load_state_dict(resize(states, comm.rank, comm.world_size))
        seconds = optimizer.state_dict()["second_moments"]
        assert torch.equal(seconds["a_weight"], states[0]["second_moments"]["a_weight"])
        train(model, optimizer, range(3, 6))
        return flat(model)

    found = run_ranks(3, after)
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_state_of_another_model_is_refused() -> None:
    model = Toy()
    optimizer = wrap(model, dgc.DGC(**SMALL))
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    state["second_moments"]["a_bias"] = torch.zeros(1)
    with pytest.raises(StateError, match="second moment of a_bias in this state has 1 elements"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("correction", [True, False])
def test_at_learning_rate_zero_nothing_moves(correction: bool) -> None:
    model = Toy()
    optimizer = wrap(model, dgc.DGC(**SMALL, momentum_correction=correction))
    for steps, lr in ((range(2), 0.0), (range(2, 5), 0.02), (range(5, 8), 0.0)):
        optimizer.param_groups[0]["lr"] = lr
        before = flat(model)
        train(model, optimizer, steps)
        assert torch.equal(before, flat(model)) == (lr == 0)
        assert optimizer.param_groups[0]["lr"] == lr
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)


@pytest.mark.parametrize("correction", [True, False])
def test_at_learning_rate_zero_nothing_enters(correction: bool) -> None:
    """With correction what was left over is still applied, as with SGD."""
    model = Toy()
    config = dgc.DGC(**SMALL, momentum_correction=correction, fold_lr=True)
    optimizer = wrap(model, config, weight_decay=0.0)
    phases = ((range(2), 0.0, False), (range(2, 5), 0.02, True), (range(5, 30), 0.0, correction))
    for steps, lr, moves in phases:
        optimizer.param_groups[0]["lr"] = lr
        before = flat(model)
        train(model, optimizer, steps)
        assert torch.equal(before, flat(model)) != moves
        assert optimizer.param_groups[0]["lr"] == lr
    if correction:
        memory = optimizer.state_dict()["memory"]
        assert not any(each["v"].any() for each in memory.values())
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)


class OwnStep(torch.optim.AdamW):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        raise AssertionError("not called")


class Renamed(torch.optim.AdamW):
    """Steps as AdamW does."""


def test_what_is_refused() -> None:
    model = Toy()
    with pytest.raises(ConfigError, match=r"OwnStep overrides Adam\.step"):
        wrap(model, dgc.DGC(), kind=OwnStep)
    with pytest.raises(ConfigError, match=r"this is NAdam.*momentum_correction=False"):
        wrap(model, dgc.DGC(), kind=torch.optim.NAdam)
    with pytest.raises(ConfigError, match=r"amsgrad is not supported.*momentum_correction=False"):
        wrap(model, dgc.DGC(), amsgrad=True)
    train(model, wrap(model, dgc.DGC(), kind=Renamed), range(2))


def test_a_step_that_was_interrupted_is_not_applied_again() -> None:
    found = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        adam = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer = dgc.DistributedOptimizer(adam, model.named_parameters(), dgc.DGC(density=0.5))
        for number in range(3):
            optimizer.zero_grad()
            model(torch.full((1, 4), 1.0 + number)).square().sum().backward()
            if interrupted and number == 1:  # what arrived is applied already
                interrupt = patch.object(
                    optimizer.inner, "put_options", side_effect=KeyboardInterrupt
                )
                with interrupt, pytest.raises(KeyboardInterrupt):
                    optimizer.step()
            else:
                optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *found))
