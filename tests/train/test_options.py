"""The options of the wrapped optimizer: whose they are during a step, and after one that failed."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import dgc
from tests.threads import ThreadCommunicator, run_ranks

DECAYING = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05}


def wrapped(
    config: dgc.DGC | dgc.Dense, comm: ThreadCommunicator | None = None
) -> tuple[nn.Linear, torch.optim.SGD, dgc.DistributedOptimizer]:
    model = nn.Linear(1000, 1, bias=False)
    nn.init.ones_(model.weight)
    sgd = torch.optim.SGD(model.parameters(), **DECAYING)  # type: ignore[arg-type]
    return model, sgd, dgc.DistributedOptimizer(sgd, model.named_parameters(), config, comm)


def step(model: nn.Linear, optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
    optimizer.zero_grad()
    (model.weight * gradient).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("start", ["dense", "all-gather"])
def test_weight_decay_is_as_strong_where_nothing_is_masked(ranks: int, start: str) -> None:
    """A dense exchange masks no momentum; "auto" may choose one for a part of training."""

    def body(comm: ThreadCommunicator, config: dgc.DGC | dgc.Dense) -> Tensor:
        model, _, optimizer = wrapped(config, comm)
        generator = torch.Generator().manual_seed(comm.rank)
        with patch("dgc.train.patterns.Patterns.choose", lambda *_: "dense"):
            for _ in range(50):
                step(model, optimizer, 1e-6 * torch.randn(1, 1000, generator=generator))
        return model.weight.detach()

    config = dgc.DGC(pattern="dense") if start == "dense" else dgc.DGC(pattern="auto")
    found, dense = (
        run_ranks(ranks, lambda comm, c=c: body(comm, c)) for c in (config, dgc.Dense())
    )
    torch.testing.assert_close(found[0], dense[0], rtol=0, atol=1e-5)
    assert dense[0].mean() < 0.9


@pytest.mark.parametrize(("pattern", "workers"), [("hierarchical", 2), ("shared-indices", 1)])
def test_weight_decay_goes_by_what_is_masked(pattern: str, workers: int) -> None:
    """At density 1 two hosts of two ranks are two workers, and ranks that send the same are one."""

    def body(comm: ThreadCommunicator, name: str, each: int) -> Tensor:
        config = dgc.DGC(density=1.0, value_bits=32, pattern=name)
        model, _, optimizer = wrapped(config, comm)
        for number in range(40):
            drawn = [
                torch.randn(1, 1000, generator=torch.Generator().manual_seed(100 * number + rank))
                for rank in range(each * comm.rank, each * (comm.rank + 1))
            ]
            step(model, optimizer, torch.stack(drawn).mean(dim=0))
        return model.weight.detach()

    found = run_ranks(4, lambda comm: body(comm, pattern, 1), per_host=2)
    expected = run_ranks(workers, lambda comm: body(comm, "all-gather", 4 // workers))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    "pattern", ["all-gather", "hierarchical", "shared-indices", "re-selecting"]
)
def test_weight_decay_has_the_momentum_of_gradients_where_all_is_sent(
    ranks: int, pattern: str
) -> None:
    """Where ranks send a tensor whole, none of it has momentum: masked SGD is SGD without."""

    def body(comm: ThreadCommunicator) -> Tensor:
        config = dgc.DGC(min_selected=1000, value_bits=32, pattern=pattern)
        model, _, optimizer = wrapped(config, comm)
        for _ in range(30):
            step(model, optimizer, torch.full((1, 1000), 0.01))
        return model.weight.detach()

    expected = 1.0
    for _ in range(30):
        expected -= 0.01 * (0.01 + 0.05 * expected)
    found = run_ranks(ranks, body, per_host=min(ranks, 2))[0]
    torch.testing.assert_close(found, torch.full((1, 1000), expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("exclude", [(), ("*",)])
@pytest.mark.parametrize("correction", [False, True])
def test_nothing_leaps_where_the_rate_is_0(exclude: tuple[str, ...], correction: bool) -> None:
    config = dgc.DGC(
        density=1.0, value_bits=32, fold_lr=True, exclude=exclude, momentum_correction=correction
    )
    model, sgd, optimizer = wrapped(config)
    for rate in (0.01, 0.01, 0.0, 0.01):
        sgd.param_groups[0]["lr"] = rate
        before = model.weight.detach().clone()
        step(model, optimizer, torch.ones(1, 1000))
        moved = (model.weight - before).abs().max()
        assert moved < 1e-7 if rate == 0 else 0.009 < moved < 0.05


def test_a_rate_set_by_a_hook_of_the_step_stays() -> None:
    model, sgd, optimizer = wrapped(dgc.DGC())
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
    sgd.register_step_post_hook(lambda *_: schedule.step())
    rates = []
    for _ in range(3):
        step(model, optimizer, torch.ones(1, 1000))
        rates.append(sgd.param_groups[0]["lr"])
    assert rates == [0.005, 0.0025, 0.00125]
    assert sgd.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("how", ["set", "load"])
def test_options_given_after_an_interrupted_step_stay(how: str) -> None:
    model, sgd, optimizer = wrapped(dgc.DGC())
    step(model, optimizer, torch.ones(1, 1000))
    saved = sgd.state_dict()
    optimizer.inner.before({})  # and its step never comes
    assert sgd.param_groups[0]["momentum"] == 0
    if how == "set":
        sgd.param_groups[0]["lr"] = 0.5
    else:
        saved["param_groups"][0]["lr"] = 0.5
        sgd.load_state_dict(saved)
    step(model, optimizer, torch.ones(1, 1000))
    assert {key: sgd.param_groups[0][key] for key in DECAYING} == {**DECAYING, "lr": 0.5}
