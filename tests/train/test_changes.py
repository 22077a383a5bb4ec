"""What changes between steps: options of SGD, steps that raise, parameters that are left out."""

from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc.errors import ConfigError, GradientError
from tests.processes import run_processes
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, sgd_of, train, wrap

WHOLE = dgc.DGC(density=1.0, value_bits=32, momentum_masking=False)
START = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
# From which step on what is set.
CHANGES: dict[str, dict[int, dict[str, float]]] = {
    "decay ends": {6: {"weight_decay": 0.0}},
    "decay ends and begins": {4: {"weight_decay": 0.0}, 8: {"weight_decay": 0.02}},
    "decay begins": {0: {"weight_decay": 0.0}, 5: {"weight_decay": 0.05}},
    "decay begins, dampened": {
        0: {"weight_decay": 0.0, "dampening": 0.9},
        5: {"weight_decay": 0.05},
    },
    "momentum begins": {0: {"momentum": 0.0}, 3: {"momentum": 0.9}},
    "momentum begins, dampened": {0: {"momentum": 0.0, "dampening": 0.4}, 3: {"momentum": 0.9}},
    "momentum ends": {5: {"momentum": 0.0}},
    "rate and momentum": {3: {"lr": 0.3, "momentum": 0.5}, 6: {"lr": 0.0}, 9: {"lr": 0.01}},
}


def change(optimizer: Any, step: int, changes: dict[int, dict[str, float]]) -> None:
    for group in optimizer.param_groups:
        group.update(changes.get(step, {}))


@pytest.mark.parametrize("exclude", [(), ("*",)])
@pytest.mark.parametrize("name", CHANGES)
def test_options_that_change_are_as_in_torch(name: str, exclude: tuple[str, ...]) -> None:
    config = dgc.DGC(density=1.0, value_bits=32, momentum_masking=False, exclude=exclude)

    def given(step: int, rank: int) -> list[Tensor]:
        return [g * (step < 9) for g in gradients(step, rank)]  # what is left over shows

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        optimizer = wrap(model, config, comm, START)
        for step in range(16):
            change(optimizer, step, CHANGES[name])
            train(model, optimizer, range(step, step + 1), given)
        return flat(model)

    model = Toy()
    plain = sgd_of(model, START)
    for step in range(16):
        change(plain, step, CHANGES[name])
        for p, *found in zip(model.parameters(), given(step, 0), given(step, 1), strict=True):
            p.grad = torch.stack(found).mean(0)
        plain.step()
    for found in run_ranks(2, body):
        torch.testing.assert_close(found, flat(model), rtol=1e-5, atol=1e-6)


def test_a_step_without_a_backward_pass_is_refused() -> None:
    model = Toy()
    optimizer = wrap(model, WHOLE, None)
    train(model, optimizer, range(2))
    before = flat(model).clone()
    with pytest.raises(GradientError, match="without a backward pass"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    train(model, optimizer, range(2, 4))
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # zeros were meant
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()  # and so was this


def test_old_gradients_are_not_kept_for_that() -> None:
    model = Toy()
    optimizer = wrap(model, WHOLE, None)
    train(model, optimizer, range(1))
    held = [ref(param.grad) for param in model.parameters()]
    optimizer.zero_grad()
    assert [each() for each in held] == [None] * len(held)


def test_a_loss_scale_is_read_anew_after_a_step_that_raised() -> None:
    config = dgc.DGC(density=1.0, value_bits=32, momentum_masking=False, max_skipped_steps=0)
    param = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([param], lr=1.0, momentum=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = dgc.DistributedOptimizer(sgd, [("p", param)], config, scaler=scaler)
    for factor in (1.0, torch.inf, 1.0):
        optimizer.zero_grad()
        loss = scaler.scale((param * factor).sum())
        if factor == torch.inf:
            with pytest.raises(GradientError, match="in a row"):
                loss.backward()
            scaler.update(2.0**8)
            continue
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
    assert param.item() == -1 - 1.5


def what_no_rank_uses_stays_as_it_is() -> None:
    """With zeros in `.grad` as with None: b, which only the first step uses, stays as it is."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

        def forward(self, both: bool) -> Tensor:
            return (self.a + self.b).sum() if both else self.a.sum()

    found = []
    for set_to_none in (True, False):
        net = Net()
        ddp = DistributedDataParallel(net, find_unused_parameters=True)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        dgc.register(ddp, sgd, WHOLE)
        for step in range(5):
            sgd.zero_grad(set_to_none=set_to_none)
            ddp(step == 0).backward()
            sgd.step()
        found.append(net.b.detach())
    torch.testing.assert_close(found[0], torch.full((2,), 1 - 0.1 * 1.1))
    assert torch.equal(*found)


def refuses_under_ddp() -> None:
    ddp = DistributedDataParallel(nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)))
    dgc.register(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), WHOLE)
    with pytest.raises(GradientError, match="sparse=False"):
        ddp(torch.tensor([1, 2])).sum().backward()
    ddp = DistributedDataParallel(nn.Linear(4, 2))
    dgc.register(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), WHOLE)
    with (
        pytest.raises(ConfigError, match="divide_by_initial_world_size"),
        ddp.join(divide_by_initial_world_size=False),
    ):
        ddp(torch.ones(1, 4)).sum().backward()


@pytest.mark.parametrize("check", [what_no_rank_uses_stays_as_it_is, refuses_under_ddp])
def test_under_ddp(check: Callable[[], None]) -> None:
    assert run_processes(1, {"ddp": check})["ddp"] == [None]
