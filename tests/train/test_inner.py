"""The user's optimizer behind the exchange: Adam, groups, schedules, clipping, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import dgc
from dgc.errors import ConfigError, GradientError
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, sgd_of, train, wrap

PLAIN = dgc.DGC(density=1.0, value_bits=32, momentum_correction=False)


def mean_of_two(step: int) -> list[Tensor]:
    return [
        torch.stack(pair).mean(0)
        for pair in zip(gradients(step, 0), gradients(step, 1), strict=True)
    ]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_at_density_one_is_dense_adam(kind: type[torch.optim.Adam]) -> None:
    options = {"lr": 0.01, "weight_decay": 0.1}

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        inner = kind(model.parameters(), **options)
        train(
            model, dgc.DistributedOptimizer(inner, model.named_parameters(), PLAIN, comm), range(9)
        )
        return flat(model)

    dense = Toy()
    optimizer = kind(dense.parameters(), **options)
    for step in range(9):
        optimizer.zero_grad()
        dense.loss(mean_of_two(step)).backward()
        optimizer.step()
    one, two = run_ranks(2, body)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, flat(dense), rtol=1e-5, atol=1e-5)


def test_adam_keeps_what_it_did_not_send() -> None:
    model = Toy()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    config = dgc.DGC(
        density=0.1, min_selected=1, value_bits=32, momentum_correction=False, fold_lr=False
    )
    optimizer = dgc.DistributedOptimizer(adam, model.named_parameters(), config)
    sent = torch.zeros(7, 5)
    for step in range(5):
        optimizer.zero_grad()
        model.loss(gradients(step, 0)).backward()
        optimizer.synchronize()
        assert model.a_weight.grad is not None
        sent += model.a_weight.grad
        optimizer.step()
    entered = sum(gradients(step, 0)[0] for step in range(5))
    residual = optimizer.state_dict()["memory"]["a_weight"]["v"].view(7, 5)
    torch.testing.assert_close(sent + residual, entered)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_cyclic_momentum_is_followed() -> None:
    def schedule_of(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CyclicLR(
            optimizer, 0.01, 0.1, step_size_up=3, base_momentum=0.5, max_momentum=0.95
        )

    groups: list[dict[str, object]] = [{"momentum": 0.9, "weight_decay": 0.02}, {"momentum": 0.5}]

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        optimizer = wrap(
            model, dgc.DGC(density=1.0, momentum_masking=False, value_bits=32), comm, *groups
        )
        schedule = schedule_of(optimizer)
        for step in range(12):
            train(model, optimizer, range(step, step + 1))
            schedule.step()
        return flat(model)

    dense = Toy()
    sgd = sgd_of(dense, *groups)
    schedule = schedule_of(sgd)
    for step in range(12):
        sgd.zero_grad()
        dense.loss(mean_of_two(step)).backward()
        sgd.step()
        schedule.step()
    torch.testing.assert_close(run_ranks(2, body)[0], flat(dense), rtol=1e-5, atol=1e-5)


def test_clip_grad_norm_after_synchronize() -> None:
    model = Toy()
    optimizer = wrap(
        model, dgc.DGC(density=0.5, min_selected=1), None, {"lr": 0.1, "momentum": 0.9}
    )
    for step in range(3):
        optimizer.zero_grad()
        model.loss(gradients(step, 0)).backward()
        optimizer.synchronize()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5
        before = flat(model)
        optimizer.step()
        torch.testing.assert_close((before - flat(model)).norm(), torch.tensor(0.05))


def test_another_optimizer_is_warned_of() -> None:
    model = Toy()
    other = torch.optim.RMSprop(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match=r"RMSprop .* momentum correction does not apply") as told:
        dgc.DistributedOptimizer(other, model.named_parameters(), PLAIN)
    assert [warning.filename for warning in told] == [__file__]  # once, where it was written
    with pytest.raises(ConfigError, match=r"RMSprop.*momentum_correction=False"):
        dgc.DistributedOptimizer(other, model.named_parameters())


def test_options_come_back_after_a_step_that_raises() -> None:
    model = Toy()
    optimizer = wrap(
        model, dgc.DGC(density=0.5, min_selected=1), None, {"lr": 0.1, "momentum": 0.9}
    )
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    model.loss(gradients(0, 0)).backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_mean_never_enters_the_memory_again(set_to_none: bool) -> None:
    model = Toy()
    optimizer = wrap(model, dgc.DGC(density=0.5, min_selected=1), None)
    for step in range(3):
        optimizer.zero_grad(set_to_none)
        model.loss(gradients(step, 0)).backward()
        optimizer.step()
    model.loss(gradients(3, 0)).backward()
    with pytest.raises(GradientError, match="zero_grad"):
        optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_is_added_to_a_mean_and_dropped_does_no_harm(set_to_none: bool) -> None:
    """As a generator's backward pass through its discriminator, between two of its steps."""
    models = [Toy(), Toy()]
    for model, disturbed in zip(models, (False, True), strict=True):
        optimizer = wrap(model, dgc.DGC(density=0.5, min_selected=1), None)
        for step in range(3):
            optimizer.zero_grad(set_to_none)
            with optimizer.no_sync():
                model.loss(gradients(2 * step, 0)).backward()
            model.loss(gradients(2 * step + 1, 0)).backward()
            optimizer.step()
            if disturbed:
                with optimizer.no_sync():
                    model.loss(gradients(step, 1)).backward()
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_the_profiler_shows_the_stages() -> None:
    model = Toy()
    optimizer = wrap(model, dgc.DGC(density=0.5, min_selected=1), None)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        train(model, optimizer, range(2))
    found = {event.key: event.count for event in trace.key_averages()}
    for stage in ("select", "encode", "exchange", "decode"):
        assert found[f"dgc::{stage}"] == 2
