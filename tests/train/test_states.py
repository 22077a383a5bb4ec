"""States that are saved or loaded at the wrong time, or belong to another optimizer."""

import copy

import pytest
import torch

import dgc
from dgc.errors import StateError
from tests.train.test_wrapping import X, make, step, wrap


def test_a_state_lies_between_steps() -> None:
    model = make()
    optimizer = wrap(model)
    step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    model(X).sum().backward()
    with pytest.raises(StateError, match="lacks what is sent"):
        optimizer.state_dict()
    with pytest.raises(StateError, match="loaded between steps"):
        optimizer.load_state_dict(saved)
    optimizer.synchronize()
    with pytest.raises(StateError, match="lacks what is sent"):
        optimizer.state_dict()
    optimizer.load_state_dict(saved)  # the step is given up
    step(model, optimizer)


CHANGES = [{"fold_lr": True}, {"momentum_correction": False}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_residuals_of_another_unit_are_refused(kind: type, change: dict[str, bool]) -> None:
    def state(**changes: bool) -> dgc.DistributedOptimizer:
        model = make()
        config = dgc.DGC(density=0.5, **changes)  # type: ignore[arg-type]
        optimizer = dgc.DistributedOptimizer(
            kind(model.parameters(), lr=0.1), model.named_parameters(), config
        )
        step(model, optimizer)
        return optimizer

    for one, other in ((state(), state(**change)), (state(**change), state())):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(StateError):
            other.load_state_dict(one.state_dict())
        after = other.state_dict()["memory"]
        for name, memory in before["memory"].items():
            assert all(torch.equal(after[name][key], t) for key, t in memory.items())


def test_a_state_of_other_groups_changes_nothing() -> None:
    model = make()
    groups = [{"params": layer.parameters()} for layer in model]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    two = dgc.DistributedOptimizer(sgd, model.named_parameters(), dgc.DGC(density=0.5))
    step(model, two)
    model = make()
    one = wrap(model, dgc.DGC(density=0.5))
    with pytest.raises(StateError, match="parameter groups"):
        one.load_state_dict(two.state_dict())
    assert one.state_dict()["step"] == 0
    assert not any(m["v"].any() for m in one.state_dict()["memory"].values())


def test_options_of_a_state_that_the_inner_optimizer_loads_count_at_once() -> None:
    config = dgc.DGC(density=0.5, fold_lr=True)
    model, twin = make(), make()
    optimizer = wrap(model, config)
    for factor in (1.0, 0.2, 0.2):
        optimizer.param_groups[0]["lr"] *= factor
        step(model, optimizer)
    again = wrap(twin, config)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.5
    again.optimizer.load_state_dict(copy.deepcopy(optimizer.optimizer.state_dict()))
    step(model, optimizer)
    step(twin, again)
    for mine, wanted in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, wanted)
