"""What users do with `DistributedOptimizer`, right and wrong."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import dgc
from dgc.errors import ConfigError, GradientError, StateError
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, sgd_of, train, wrap

FULL = dgc.DGC(density=1.0, momentum_masking=False, value_bits=32)


def grads_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])


def test_no_sync_accumulates_as_one_backward_of_the_sum() -> None:
    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        model, twin = Toy(integers=True), Toy(integers=True)
        optimizer, other = wrap(model, FULL, comm), wrap(twin, FULL, comm)
        halves = [gradients(step, comm.rank, integers=True) for step in range(2)]
        with optimizer.no_sync():
            model.loss(halves[0]).backward()
        model.loss(halves[1]).backward()
        optimizer.step()
        twin.loss([a + b for a, b in zip(*halves, strict=True)]).backward()
        other.step()
        return flat(model), flat(twin)

    for found, wanted in run_ranks(2, body):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = Toy()
    optimizer = wrap(model, dgc.DGC(), None)
    model.loss(gradients(0, 0)).backward()
    with pytest.raises(GradientError, match=r"zero_grad\(\) between backward\(\) and step\(\)"):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in model.parameters():
        assert param.grad is None if set_to_none else not param.grad.any()
    train(model, optimizer, range(1, 3))


def test_second_backward_and_early_step_are_refused() -> None:
    model = Toy()
    optimizer = wrap(model, dgc.DGC(), None)
    model.loss(gradients(0, 0)).backward()
    with pytest.raises(GradientError, match="no_sync"):
        model.loss(gradients(0, 0)).backward()
    model = Toy()
    optimizer = wrap(model, dgc.DGC(), None)
    with optimizer.no_sync(), pytest.raises(GradientError, match="no_sync"):
        optimizer.step()
    model.loss(gradients(0, 0)).backward()
    optimizer.synchronize()
    with pytest.raises(GradientError, match="between synchronize"):
        model.loss(gradients(0, 0)).backward()
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: 0.0)  # type: ignore[arg-type]


def test_clipping_after_synchronize_counts() -> None:
    model = Toy()
    optimizer = wrap(model, FULL, None, {"lr": 0.5})
    before = flat(model)
    model.loss(gradients(0, 0)).backward()
    optimizer.synchronize()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    assert float((flat(model) - before).norm()) == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_learning_rate_zero_neither_loses_nor_moves_what_enters() -> None:
    model = Toy()
    optimizer = wrap(model, FULL, None, {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.1})
    before = flat(model)
    train(model, optimizer, range(2))
    assert torch.equal(flat(model), before)
    assert optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize(
    "config", [dgc.DGC(density=0.2, min_selected=1, value_bits=32), dgc.Dense()], ids=str
)
def test_parameters_that_some_or_no_ranks_use(config: dgc.DGC | dgc.Dense) -> None:
    """On one rank: a zero gradient there. On none: as if the parameter had not been there."""

    def find(step: int, rank: int) -> Sequence[Tensor | None]:
        drawn: list[Tensor | None] = list(gradients(step, rank))
        if rank == 1:
            drawn[0] = None
        if step == 3:
            drawn[2] = None
        return drawn

    def zeros(step: int, rank: int) -> Sequence[Tensor | None]:
        return [torch.zeros(3, 7) if g is None and step != 3 else g for g in filled(step, rank)]

    def filled(step: int, rank: int) -> Sequence[Tensor | None]:
        found = list(find(step, rank))
        found[0] = torch.zeros(7, 5) if found[0] is None else found[0]
        return found

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor, bool]:
        model, twin = Toy(), Toy()
        optimizer, other = wrap(model, config, comm), wrap(twin, config, comm)
        train(model, optimizer, range(4), find)
        unused = list(model.parameters())[2].grad is None
        train(twin, other, range(4), zeros)
        return flat(model), flat(twin), unused

    for found, wanted, unused in run_ranks(2, body):
        assert torch.equal(found, wanted)
        assert unused


def test_unused_everywhere_leaves_state_and_parameter() -> None:
    def body(comm: ThreadCommunicator) -> None:
        model = Toy()
        optimizer = wrap(model, dgc.DGC(density=0.2, min_selected=1), comm)
        train(model, optimizer, range(3))
        before, state = next(iter(model.parameters())).clone(), optimizer.state_dict()["memory"]
        train(model, optimizer, range(3, 4), lambda s, r: [None, *gradients(s, r)[1:]])
        after = optimizer.state_dict()["memory"]
        assert torch.equal(next(iter(model.parameters())), before)
        assert torch.equal(state["a_weight"]["u"], after["a_weight"]["u"])
        assert torch.equal(state["a_weight"]["v"], after["a_weight"]["v"])
        assert not torch.equal(state["a_bias"]["v"], after["a_bias"]["v"])

    run_ranks(2, body)


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 100.0])
def test_non_finite_gradient_on_one_rank(masking: bool, clip_norm: float | None) -> None:
    """All ranks skip together; nothing is lost and nothing non-finite stays."""
    config = dgc.DGC(
        density=0.2,
        min_selected=1,
        value_bits=32,
        bucket_bytes=32,
        fold_lr=False,
        momentum_masking=masking,
        clip_norm=clip_norm,
    )

    def find(step: int, rank: int) -> Sequence[Tensor | None]:
        drawn = gradients(step, rank)
        if (step, rank) == (2, 1):
            drawn[1][3] = torch.inf
        return drawn

    def body(comm: ThreadCommunicator) -> dict[str, float | int | str]:
        model = Toy()
        optimizer = wrap(model, config, comm)
        train(model, optimizer, range(2), find)
        before, state = flat(model), optimizer.state_dict()["memory"]
        train(model, optimizer, range(2, 3), find)
        assert torch.equal(flat(model), before)
        after = optimizer.state_dict()["memory"]
        bad = {"a_bias", "a_weight"} if clip_norm is None else set(after)  # its bucket
        for name in after:
            u, v = state[name]["u"], state[name]["v"]
            if comm.rank == 0 or name not in bad:  # what entered stays
                place = list(dict(model.named_parameters())).index(name)
                u = 0.9 * u + find(2, comm.rank)[place].view(-1)  # type: ignore[union-attr]
                v = v + u
            torch.testing.assert_close(after[name]["u"], u)
            torch.testing.assert_close(after[name]["v"], v)
        train(model, optimizer, range(3, 5), find)
        assert flat(model).isfinite().all()
        assert not torch.equal(flat(model), before)
        return optimizer.stats()

    for stats in run_ranks(2, body):
        assert (stats["steps"], stats["skipped_steps"]) == (5, 1)


@pytest.mark.parametrize(
    "config", [dgc.DGC(max_skipped_steps=2), dgc.Dense(max_skipped_steps=2)], ids=str
)
def test_too_many_skipped_steps(config: dgc.DGC | dgc.Dense) -> None:
    def find(step: int, rank: int) -> list[Tensor]:
        return [g * float("nan") for g in gradients(step, rank)]

    model = Toy()
    optimizer = wrap(model, config, None)
    train(model, optimizer, range(2), find)
    with pytest.raises(GradientError, match="3 steps in a row"):
        train(model, optimizer, range(2, 3), find)


def test_state_resumes_bit_for_bit() -> None:
    config = dgc.DGC(density=0.1, min_selected=1, warmup_steps=12)
    options = {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.1}

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        whole = Toy()
        train(whole, wrap(whole, config, comm, options), range(20))
        part, resumed = Toy(), Toy(seed=1)
        optimizer = wrap(part, config, comm, options)
        train(part, optimizer, range(10))
        state, weights = optimizer.state_dict(), copy.deepcopy(part.state_dict())
        train(part, optimizer, range(10, 12))  # a state must not follow what comes after it
        again = wrap(resumed, config, comm, options)
        again.load_state_dict(state)
        resumed.load_state_dict(weights)
        train(resumed, again, range(10, 20))
        return flat(whole), flat(resumed)

    for wanted, found in run_ranks(2, body):
        assert torch.equal(found, wanted)


def test_foreign_states_are_refused_and_change_nothing() -> None:
    optimizer = wrap(Toy(), dgc.DGC(), None)
    state = optimizer.state_dict()
    for key, value in {"version": 0, "rank": 3}.items():
        with pytest.raises(StateError, match=f"{key} {value}"):
            optimizer.load_state_dict({**state, key: value})
    memory = {n: m for n, m in state["memory"].items() if n != "scale"}
    with pytest.raises(StateError, match="scale"):
        optimizer.load_state_dict({**state, "memory": memory})
    wrong = {**state["memory"], "a_bias": {"u": torch.zeros(2), "v": torch.zeros(2)}}
    with pytest.raises(StateError, match="a_bias"):
        optimizer.load_state_dict({**state, "memory": wrong})


def test_stats_count_what_the_communicator_saw() -> None:
    def body(comm: ThreadCommunicator) -> None:
        for config in (
            dgc.DGC(density=0.01, min_selected=1),
            dgc.DGC(exclude=("a*",)),
            dgc.Dense(),
        ):
            model = Toy()
            optimizer = wrap(model, config, comm)
            before = comm.sent_bytes
            train(model, optimizer, range(3))
            stats = optimizer.stats()
            assert stats["sent_bytes"] == comm.sent_bytes - before
            assert stats["dense_bytes"] == 3 * 4 * flat(model).numel()
            assert stats["compression_ratio"] == stats["dense_bytes"] / stats["sent_bytes"]

    run_ranks(2, body)
    alone = wrap(Toy(), dgc.DGC(), None)
    assert alone.stats()["sent_bytes"] == 0


def test_tied_weights_count_once_and_frozen_ones_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    named = list(model.named_parameters(remove_duplicate=False))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = dgc.DistributedOptimizer(sgd, named)
    assert list(optimizer.params) == ["0.weight", "0.bias", "1.bias"]


def test_buffers_are_broadcast_on_request() -> None:
    def body(comm: ThreadCommunicator) -> Tensor:
        model = nn.BatchNorm1d(3)
        model.running_mean.fill_(comm.rank + 1.0)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        dgc.DistributedOptimizer(
            sgd, model.named_parameters(), comm=comm, named_buffers=model.named_buffers()
        )
        return model.running_mean

    assert all(torch.equal(mean, torch.ones(3)) for mean in run_ranks(2, body))


def test_half_precision_and_channels_last_parameters() -> None:
    for model in (Toy().bfloat16(), nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)):
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = dgc.DistributedOptimizer(sgd, model.named_parameters(), FULL)
        before = [p.detach().clone() for p in model.parameters()]
        grads = [torch.randn_like(p) for p in model.parameters()]
        torch.stack(
            [(p * g).sum() for p, g in zip(model.parameters(), grads, strict=True)]
        ).sum().backward()
        optimizer.step()
        for p, old, g in zip(model.parameters(), before, grads, strict=True):
            torch.testing.assert_close(p.detach(), old - g)


class OwnMomentum(torch.optim.SGD):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        raise AssertionError("not called")


def test_bad_optimizers() -> None:
    model = Toy()
    named = list(model.named_parameters())
    with pytest.raises(ConfigError, match="OwnMomentum overrides"):
        dgc.DistributedOptimizer(OwnMomentum(model.parameters(), lr=0.1), named)
    with pytest.raises(ConfigError, match="applied twice"):
        dgc.DistributedOptimizer(wrap(model, dgc.DGC(), None), named)
    stepped = sgd_of(model, {"momentum": 0.9})
    model.loss(gradients(0, 0)).backward()
    stepped.step()
    with pytest.raises(ConfigError, match="momentum of earlier steps"):
        dgc.DistributedOptimizer(stepped, named)
    with pytest.raises(ConfigError, match="add_param_group"):
        wrap(Toy(), dgc.DGC(), None).add_param_group({"params": []})


def test_bad_names() -> None:
    model = Toy()
    sgd, named = sgd_of(model, {}), list(model.named_parameters())
    with pytest.raises(ConfigError, match=r"'a_weight' twice"):
        dgc.DistributedOptimizer(sgd, [(named[0][0], p) for _, p in named])
    with pytest.raises(ConfigError, match=r"1 parameters of the optimizer .* shape \(7, 5\)"):
        dgc.DistributedOptimizer(sgd, named[1:])
    double = nn.Linear(2, 2).double()
    with pytest.raises(ConfigError, match=r"weight is torch.float64"):
        dgc.DistributedOptimizer(
            torch.optim.SGD(double.parameters(), lr=0.1), double.named_parameters()
        )
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to do"):
        dgc.DistributedOptimizer(sgd, named)


def test_ddp_beside_the_wrapper_is_warned_of() -> None:
    model = Toy()
    named = [(f"module.{name}", param) for name, param in model.named_parameters()]
    with pytest.warns(UserWarning, match=r"use dgc\.register"):
        dgc.DistributedOptimizer(sgd_of(model, {}), named)


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = wrap(model, dgc.DGC(), None)
    loss = model(torch.tensor([1])).sum()
    with pytest.raises(GradientError, match=r"weight is torch.sparse_coo.*sparse=False"):
        loss.backward()
    del optimizer


def test_ranks_that_differ_are_told_where() -> None:
    def other_model(comm: ThreadCommunicator) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2 + comm.rank))
        with pytest.raises(ConfigError, match=r"parameter number 2 differs.*1.weight"):
            wrap(model, dgc.DGC(), comm)

    def fewer(comm: ThreadCommunicator) -> None:
        model = nn.Linear(3, 4, bias=comm.rank == 0)
        with pytest.raises(ConfigError, match=r"parameter number 1 differs.*(bias|missing)"):
            wrap(model, dgc.DGC(), comm)

    def other_config(comm: ThreadCommunicator) -> None:
        with pytest.raises(ConfigError, match=r"different configurations[\s\S]*density=0\.0"):
            wrap(Toy(), dgc.DGC(density=0.01, min_selected=1 + comm.rank), comm)

    for body in (other_model, fewer, other_config):
        run_ranks(2, body)
