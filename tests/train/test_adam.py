"""Adam and AdamW with momentum correction: β1 in the memory, the rest in the optimizer."""

from typing import Any

import pytest
import torch
from torch import Tensor

import dgc
from dgc.errors import ConfigError
from tests.oracle import AdamWOracle, Sgd
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, train

OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.1}
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
        {"fold_lr": False},
        {"momentum_masking": False},
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
    sgd = {name: Sgd(momentum=0.8, weight_decay=0.1) for name in named}
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


@pytest.mark.parametrize("exclude", [(), ("*",), ("a_*",)])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_density_one_is_adam_on_the_mean_momentum(kind: Any, exclude: tuple[str, ...]) -> None:
    """And excluded parameters are trained as all would be at density 1."""
    config = dgc.DGC(density=1.0, value_bits=32, momentum_masking=False, exclude=exclude)

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        train(model, wrap(model, config, comm, kind, amsgrad=True, maximize=True), range(STEPS))
        return flat(model)

    dense = Toy()
    options = {**OPTIONS, "betas": (0.0, 0.99), "amsgrad": True, "maximize": True}
    optimizer = kind(dense.parameters(), **options)
    means = [torch.zeros_like(p) for p in dense.parameters()]
    for step in range(STEPS):
        both = zip(gradients(step, 0), gradients(step, 1), strict=True)
        for mean, param, pair in zip(means, dense.parameters(), both, strict=True):
            param.grad = mean.lerp_(torch.stack(pair).mean(0), 0.2).clone()
        optimizer.step()
    torch.testing.assert_close(run_ranks(2, body)[0], flat(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 4, 32])
def test_conservation(bits: int) -> None:
    """Without masking: Σ sent + residual = Σ lr·u, on each rank."""
    config = dgc.DGC(**{**SMALL, "value_bits": bits, "momentum_masking": False})

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        model = Toy()
        optimizer = wrap(model, config, comm)
        zeros = torch.zeros_like(flat(model))
        u, entered, sent = zeros, zeros, zeros
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = rate(step)
            u = 0.8 * u + 0.2 * torch.cat([g.view(-1) for g in gradients(step, comm.rank)])
            entered = entered + rate(step) * u
            optimizer.zero_grad()
            model.loss(gradients(step, comm.rank)).backward()
            optimizer.synchronize()
            arrived = [p.grad.view(-1) for p in model.parameters() if p.grad is not None]
            sent = sent + rate(step) * torch.cat(arrived)
            optimizer.step()
        memory = optimizer.state_dict()["memory"]
        residual = torch.cat([memory[name]["v"] for name, _ in model.named_parameters()])
        return entered - residual, sent

    results = run_ranks(2, body)
    wanted = sum(each[0] for each in results) / 2
    assert (results[0][1] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


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
    train(model, wrap(model, dgc.DGC(), kind=Renamed), range(2))
