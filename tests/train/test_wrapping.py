"""What may happen around the training loop: wrapping again, unfreezing, interrupts."""

import copy
import gc
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dgc
from dgc.errors import ConfigError, GradientError
from tests.threads import ThreadCommunicator, run_ranks

ALL = dgc.DGC(density=1.0, value_bits=32, momentum_masking=False)
X = torch.ones(2, 4)


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def sgd_of(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)  # type: ignore[arg-type]


def wrap(
    model: nn.Module, config: dgc.DGC = ALL, comm: ThreadCommunicator | None = None
) -> dgc.DistributedOptimizer:
    sgd = sgd_of(model, momentum=0.9)
    return dgc.DistributedOptimizer(sgd, model.named_parameters(), config, comm)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


def test_frozen_parameters_are_broadcast() -> None:
    def body(comm: ThreadCommunicator) -> list[Tensor]:
        model = make(comm.rank)
        model[0].requires_grad_(False)
        wrap(model, comm=comm)
        return [p.detach() for p in model.parameters()]

    for first, second in zip(*run_ranks(2, body), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("frozen", [(0, 1), (1, None)])
def test_ranks_that_freeze_different_parameters_are_told(frozen: tuple[int, int | None]) -> None:
    def body(comm: ThreadCommunicator) -> None:
        model, layer = make(), frozen[comm.rank]
        if layer is not None:
            model[layer].requires_grad_(False)
        wrap(model, comm=comm)

    with pytest.raises(ConfigError, match="ranks hold different models"):
        run_ranks(2, body)


def unfreeze(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(True)


def add(model: nn.Sequential, sgd: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(True)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    sgd.add_param_group({"params": [model[0].weight]})


@pytest.mark.parametrize("change", [unfreeze, add])
def test_a_parameter_that_is_not_exchanged_is_not_trained(
    change: Callable[[nn.Sequential, torch.optim.Optimizer], None],
) -> None:
    model = make()
    model[0].requires_grad_(False)
    optimizer = wrap(model)
    step(model, optimizer)
    change(model, optimizer.optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GradientError, match=r"of this rank alone.*wrap or register"):
        step(model, optimizer)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_wrapping_again_trains_what_was_frozen() -> None:
    model, twin = make(), make()
    model[0].requires_grad_(False)
    optimizer = wrap(model)
    step(model, optimizer)
    twin.load_state_dict(model.state_dict())
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="has not sent yet is dropped"):
        again = wrap(model)
    for _ in range(3):
        step(model, again)
        if not again.stats()["steps"]:
            raise AssertionError("nothing was exchanged")
    plain = sgd_of(twin, momentum=0.9)
    for _ in range(3):
        step(twin, plain)
    for mine, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted)
    with pytest.raises(ConfigError, match="made later"):
        optimizer.step()


def test_what_is_frozen_after_wrapping_trains_again() -> None:
    model = make()
    optimizer = wrap(model)
    before = [p.detach().clone() for p in model[0].parameters()]
    model[0].requires_grad_(False)
    step(model, optimizer)
    assert all(torch.equal(p, was) for p, was in zip(model[0].parameters(), before, strict=True))
    model[0].requires_grad_(True)
    step(model, optimizer)
    assert not any(
        torch.equal(p, was) for p, was in zip(model[0].parameters(), before, strict=True)
    )


def test_a_scaled_gradient_that_was_not_exchanged_is_not_stepped_with() -> None:
    model, scaler = make(), torch.amp.GradScaler("cpu")
    sgd = sgd_of(model, momentum=0.9)
    optimizer = dgc.DistributedOptimizer(sgd, model.named_parameters(), ALL, scaler=scaler)
    with optimizer.no_sync():
        scaler.scale(model(X).sum()).backward()
    with pytest.raises(GradientError, match="unscaled again"):
        scaler.step(optimizer)


def test_wrapping_between_backward_and_step_is_refused() -> None:
    model = make()
    optimizer = wrap(model)
    model(X).sum().backward()
    with pytest.raises(ConfigError, match="between steps"):
        wrap(model)
    optimizer.step()


def test_a_wrapper_that_is_gone_exchanges_no_more() -> None:
    model = make()
    optimizer = wrap(model)
    step(model, optimizer)
    del optimizer
    gc.collect()
    plain = sgd_of(model)
    for _ in range(2):
        step(model, plain)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_clipping_before_the_mean_has_come_is_refused() -> None:
    model = make()
    optimizer = wrap(model)
    model(X).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(
        GradientError, match=r"changed or cleared between backward\(\) and step\(\)"
    ):
        optimizer.step()
    optimizer.step()  # without gradients
    optimizer.state_dict()
    step(model, optimizer)
    assert optimizer.stats()["steps"] == 2


def test_a_step_that_is_dropped_returns_to_the_memory() -> None:
    model = make()
    optimizer = wrap(model, dgc.DGC(density=0.1, min_selected=1, value_bits=32))
    model(X).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(GradientError, match="This step is dropped"):
        optimizer.step()
    memory = optimizer.state_dict()["memory"]
    for name, grad in zip(optimizer.params, before, strict=True):
        torch.testing.assert_close(memory[name]["v"], grad.flatten())


@pytest.mark.parametrize("config", [dgc.Dense(), dgc.DGC(density=0.5, exclude=("1",))])
def test_gradients_that_are_views_of_one_tensor(config: dgc.DGC | dgc.Dense) -> None:
    parts = nn.ParameterList([torch.ones(4, 4), torch.ones(4, 4)])
    optimizer = dgc.DistributedOptimizer(
        sgd_of(parts), parts.named_parameters(), replace(config, bucket_bytes=1)
    )
    nn.functional.linear(X, torch.cat([*parts])).sum().backward()
    assert parts[0].grad.untyped_storage().data_ptr() == parts[1].grad.untyped_storage().data_ptr()
    optimizer.step()
    assert optimizer.stats()["steps"] == 1


def test_frozen_parameters_with_old_gradients_of_zero() -> None:
    model = make()
    model(X).sum().backward()
    model.zero_grad(set_to_none=False)
    model[0].requires_grad_(False)
    step(model, wrap(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_the_wrapper_is_not_copied(copied: Callable[[object], object]) -> None:
    with pytest.raises(ConfigError, match="use state_dict"):
        copied(wrap(make()))


def test_dampening_without_momentum_is_none() -> None:
    model, twin = make(), make()
    options = {"dampening": 0.5}
    optimizer = dgc.DistributedOptimizer(sgd_of(model, **options), model.named_parameters(), ALL)
    plain = sgd_of(twin, **options)
    for _ in range(3):
        step(model, optimizer)
        step(twin, plain)
    for mine, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("pattern", ["all-gather", "hierarchical", "re-selecting"])
def test_empty_parameters(pattern: str) -> None:
    def body(comm: ThreadCommunicator) -> Tensor:
        model = make()
        model.register_parameter("none", nn.Parameter(torch.empty(0)))
        optimizer = wrap(model, dgc.DGC(density=0.5, pattern=pattern), comm)
        for _ in range(3):
            optimizer.zero_grad()
            (model(X).square().sum() + model.none.sum()).backward()
            optimizer.step()
        return model[0].weight.detach()

    first, *others = run_ranks(4, body, per_host=2)
    assert all(torch.equal(first, each) for each in others)


def test_excluded_names() -> None:
    with pytest.raises(ConfigError, match=r"exclude is .*a tuple of patterns"):
        dgc.DGC(exclude=["*.bias"])  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"exclude has 'bais'"):
        wrap(make(), dgc.DGC(exclude=("bais", "*.bias")))


@pytest.mark.parametrize("how", ["cleared", "replaced"])
def test_a_gradient_that_is_taken_away_while_it_is_exchanged_drops_the_step(how: str) -> None:
    model = make()
    optimizer = wrap(model)
    model(X).square().sum().backward()
    for param in model.parameters():
        assert param.grad is not None
        param.grad = None if how == "cleared" else param.grad / 4
    with pytest.raises(GradientError, match="changed or cleared"):
        optimizer.step()
    step(model, optimizer)


def test_a_mean_that_is_not_stepped_with_is_not_dropped_in_silence() -> None:
    model = make()
    optimizer = wrap(model)
    model(X).square().sum().backward()
    optimizer.synchronize()
    with pytest.raises(GradientError, match="inside no_sync"):
        optimizer.zero_grad()
    with pytest.raises(GradientError, match="a backward pass between"), optimizer.no_sync():
        model(X).square().sum().backward()
    model.zero_grad()
    with pytest.raises(GradientError, match=r"as by model\.zero_grad"):
        optimizer.step()
    step(model, optimizer)


def test_a_parameter_of_another_size_is_refused() -> None:
    """Compiled loops go by the sizes that they were given."""
    model = nn.Linear(4, 300)
    optimizer = dgc.DistributedOptimizer(sgd_of(model), model.named_parameters(), ALL)
    step(model, optimizer)
    model.weight.data, model.bias.data = torch.ones(30_000, 4), torch.ones(30_000)
    optimizer.zero_grad()
    with pytest.raises(GradientError, match="elements on cpu, when it was wrapped it had"):
        model(X).sum().backward()


def test_a_mean_that_fp16_does_not_hold_is_not_applied() -> None:
    weight = nn.Parameter(torch.zeros(8, dtype=torch.float16))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer = dgc.DistributedOptimizer(sgd, [("weight", weight)], ALL)
    for _ in range(3):  # the momentum of the third is 81,300, and 65,504 is the largest number
        optimizer.zero_grad()
        (weight * 30_000.0).sum().backward()
        optimizer.step()
    assert weight.tolist() == [-8696.0] * 8
    assert optimizer.stats()["skipped_steps"] == 1


@pytest.mark.parametrize(
    "config",
    [dgc.Dense(), ALL, dgc.DGC(pattern="dense"), dgc.DGC(exclude=("*",))],
    ids=["dense", "coded", "uncoded", "excluded"],
)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_that_can_be_differentiated(config: dgc.DGC | dgc.Dense) -> None:
    model = make()
    optimizer = dgc.DistributedOptimizer(sgd_of(model), model.named_parameters(), config)
    model(X).square().sum().backward(create_graph=True)
    optimizer.synchronize()
    optimizer.step()
    assert optimizer.stats()["steps"] == 1


@pytest.mark.parametrize("pattern", ["all-gather", "dense", "shared-indices", "re-selecting"])
def test_another_default_dtype_changes_nothing(pattern: str) -> None:
    config = dgc.DGC(density=0.5, min_selected=1, pattern=pattern)

    def body(comm: ThreadCommunicator) -> Tensor:
        model = nn.Linear(4, 2, dtype=torch.float32)
        nn.init.ones_(model.weight), nn.init.ones_(model.bias)
        optimizer = wrap(model, config, comm)
        for _ in range(3):
            optimizer.zero_grad()
            (model.weight.square().sum() * (1 + comm.rank) / 7 + model.bias.sum() / 3).backward()
            optimizer.step()
        return torch.cat([model.weight.detach().view(-1), model.bias.detach()])

    expected = run_ranks(2, body)[0]
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = run_ranks(2, body)[0]
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, expected)


def test_auto_with_empty_parameters_alone() -> None:
    def body(comm: ThreadCommunicator) -> None:
        model = nn.ParameterList([torch.empty(0), torch.empty(0, 3)])
        wrap(model, dgc.DGC(pattern="auto"), comm)

    run_ranks(2, body)
