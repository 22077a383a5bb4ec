"""What two gloo ranks check of the DDP hook; run by test_hook.py."""

import copy
import io
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dgc
from dgc.comm.torch_dist import TorchCommunicator
from dgc.errors import ConfigError, GradientError, StateError
from tests.core.on_device import DEVICE

CONFIG = dgc.DGC(density=0.1, min_selected=1, warmup_steps=4, bucket_bytes=600)
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


class Net(nn.Module):
    """Layers used in another order than they are defined in, one of them only sometimes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(8, 3)
        self.first = nn.Linear(6, 8)
        self.extra = nn.Linear(8, 8)
        self.to(DEVICE)

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        x = self.first(x).tanh()
        return self.last(self.extra(x) if extra else x)


def data(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(5, 6, generator=generator).to(DEVICE)


def ddp_of(model: nn.Module, **options: Any) -> DDP:
    return DDP(model, bucket_cap_mb=0.0005, **options)


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def same_memory(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["memory"].keys() == b["memory"].keys()
    for name, states in a["memory"].items():
        for key, tensor in states.items():
            assert torch.equal(tensor, b["memory"][name][key]), (name, key)


def same_on_all_ranks(model: nn.Module) -> None:
    flat = torch.cat([p.detach().float().view(-1) for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(both, flat)
    assert all(torch.equal(flat, other) for other in both)


def train_pair(
    config: dgc.DGC | dgc.Dense,
    *,
    steps: int = 6,
    passes: int = 1,
    extra: Any = lambda step: True,
    options: dict[str, Any] | None = None,
    dtypes: dict[str, torch.dtype] | None = None,
    adam: bool = False,
) -> tuple[dgc.DistributedOptimizer, Any]:
    """Train one net through DDP and one through DistributedOptimizer; they must stay the same."""
    one, two = Net(), Net()
    for name, dtype in (dtypes or {}).items():
        for net in (one, two):
            getattr(net, name).to(dtype)
            getattr(net, name).register_forward_pre_hook(lambda m, a: (a[0].to(m.weight.dtype),))
            getattr(net, name).register_forward_hook(lambda m, a, out: out.float())
    ddp = ddp_of(one, **(options or {}))
    mine, theirs = (
        torch.optim.AdamW(net.parameters()) if adam else torch.optim.SGD(net.parameters(), **SGD)
        for net in (one, two)
    )
    state = dgc.register(ddp, mine, config)
    wrapped = dgc.DistributedOptimizer(theirs, two.named_parameters(), config, TorchCommunicator())
    for step in range(steps):
        for model, optimizer, no_sync in (
            (ddp, mine, ddp.no_sync),
            (two, wrapped, wrapped.no_sync),
        ):
            optimizer.zero_grad()
            for each in range(passes):
                with no_sync() if each + 1 < passes else nullcontext():
                    model(data(passes * step + each), extra(step)).square().mean().backward()
            optimizer.step()
        same(one, two)
    same_memory(state.state_dict(), wrapped.state_dict())
    same_on_all_ranks(one)
    return wrapped, state


def equals_the_optimizer() -> None:
    train_pair(CONFIG)
    train_pair(CONFIG, options={"gradient_as_bucket_view": True})
    train_pair(CONFIG, options={"static_graph": True})
    train_pair(CONFIG, passes=3)
    train_pair(dgc.DGC.paper(warmup_steps=4, density=0.1, clip_norm=0.5))
    train_pair(dgc.DGC(density=0.1, min_selected=1, exclude=("*.bias",)))
    train_pair(dgc.DGC(density=0.1, min_selected=1, exclude=("*.bias",)), adam=True)
    train_pair(dgc.DGC(density=0.1, min_selected=1, state_dtype=torch.bfloat16))


def equals_the_optimizer_in_mixed_dtypes() -> None:
    train_pair(CONFIG, dtypes={"extra": torch.bfloat16, "last": torch.float16})


def equals_the_optimizer_with_unused_parameters() -> None:
    unused = {"find_unused_parameters": True}
    on_rank_0 = dist.get_rank() == 0
    train_pair(CONFIG, options=unused, extra=lambda step: step in (0, 3))
    train_pair(CONFIG, options=unused, extra=lambda step: on_rank_0)
    train_pair(CONFIG, options={"static_graph": True}, extra=lambda step: False)


def dense_equals_ddp() -> None:
    one, two = Net(), Net()
    plain, hooked = DDP(one), DDP(two)
    optimizers = [torch.optim.SGD(net.parameters(), **SGD) for net in (one, two)]
    dgc.register(hooked, optimizers[1], dgc.Dense())
    for step in range(4):
        for model, optimizer in zip((plain, hooked), optimizers, strict=True):
            optimizer.zero_grad()
            model(data(step)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close([*one.parameters()], [*two.parameters()], rtol=1e-6, atol=1e-7)


def keeps_mass_of_unused_parameters() -> None:
    for view in (False, True):  # then `.grad` is what DDP exchanges
        ddp = ddp_of(Net(), find_unused_parameters=True, gradient_as_bucket_view=view)
        sgd = torch.optim.SGD(ddp.parameters(), **SGD)
        state = dgc.register(ddp, sgd, CONFIG)
        for step in range(3):
            before = state.state_dict()["memory"]["extra.weight"]
            sgd.zero_grad(set_to_none=not view)
            ddp(data(step), step == 0).square().mean().backward()
            assert not (step and view) or not ddp.module.extra.weight.grad.any()
            sgd.step()
            after = state.state_dict()["memory"]["extra.weight"]
            assert torch.equal(before["v"], after["v"]) == (step > 0)


def joins_uneven_inputs() -> None:
    ddp = ddp_of(Net())
    sgd = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    state = dgc.register(ddp, sgd, CONFIG)
    for _ in range(2):
        with ddp.join():
            for step in range(3 + 2 * dist.get_rank()):
                sgd.zero_grad()
                ddp(data(step)).square().mean().backward()
                sgd.step()
    assert state.stats()["steps"] == 10
    same_on_all_ranks(ddp)


def compiles() -> None:
    one, two = Net(), Net()
    models = [DDP(one), torch.compile(DDP(two), backend="aot_eager")]
    for net, model in zip((one, two), models, strict=True):
        sgd = torch.optim.SGD(net.parameters(), **SGD)
        state = dgc.register(model, sgd, CONFIG)
        for step in range(5):
            sgd.zero_grad()
            model(data(step)).square().mean().backward()
            sgd.step()
        assert state.stats()["steps"] == 5
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def notices_a_missing_zero_grad() -> None:
    ddp = ddp_of(Net())
    sgd = torch.optim.SGD(ddp.parameters(), **SGD)
    dgc.register(ddp, sgd, CONFIG)
    for step, set_to_none in enumerate((True, False)):
        sgd.zero_grad(set_to_none)
        ddp(data(step)).square().mean().backward()
        sgd.step()
    with pytest.raises(GradientError, match="zero_grad"):
        ddp(data(2)).square().mean().backward()


def notices_a_step_without_exchange() -> None:
    ddp = ddp_of(Net())
    sgd = torch.optim.SGD(ddp.parameters(), **SGD)
    dgc.register(ddp, sgd, CONFIG)
    with ddp.no_sync():
        ddp(data(0)).square().mean().backward()
    with pytest.raises(GradientError, match="no_sync"):
        sgd.step()


def skips_together() -> None:
    ddp = ddp_of(Net())
    sgd = torch.optim.SGD(ddp.parameters(), **SGD)
    state = dgc.register(ddp, sgd, CONFIG)
    for step in range(4):
        params = [p.detach().clone() for p in ddp.parameters()]
        memory = copy.deepcopy(state.state_dict()["memory"])
        bad = step == 2 and dist.get_rank() == 1
        sgd.zero_grad()
        (ddp(data(step)).square().mean() * (torch.inf if bad else 1)).backward()
        sgd.step()
        if step == 2:
            after = state.state_dict()["memory"]
            assert all(map(torch.equal, params, ddp.parameters()))
            for name, states in after.items():
                for key, tensor in states.items():
                    assert tensor.isfinite().all()
                    assert not bad or torch.equal(tensor, memory[name][key])
    assert state.stats()["skipped_steps"] == 1
    same_on_all_ranks(ddp)


def resumes_bit_for_bit() -> None:
    ddp = ddp_of(Net())
    sgd = torch.optim.SGD(ddp.parameters(), **SGD)
    state = dgc.register(ddp, sgd, CONFIG)
    wrapped, twin = None, Net()
    for step in range(6):
        if step == 3:  # go on in the other wrapper: the format is the same
            twin.load_state_dict(ddp.module.state_dict())
            theirs = torch.optim.SGD(twin.parameters(), **SGD)
            wrapped = dgc.DistributedOptimizer(
                theirs, twin.named_parameters(), CONFIG, TorchCommunicator()
            )
            saved = io.BytesIO()
            torch.save(state.state_dict(), saved)
            saved.seek(0)
            loaded = torch.load(saved, weights_only=True)
            wrapped.load_state_dict({**loaded, "optimizer": sgd.state_dict()})
        for model, optimizer in ((ddp, sgd), (twin, wrapped)):
            if optimizer is not None:
                optimizer.zero_grad()
                model(data(step)).square().mean().backward()
                optimizer.step()
    same(ddp.module, twin)


def takes_a_closure() -> None:
    nets = [Net(), Net()]
    for net, with_closure in zip(nets, (False, True), strict=True):
        ddp = ddp_of(net)
        sgd = torch.optim.SGD(net.parameters(), **SGD)
        dgc.register(ddp, sgd, CONFIG)
        for step in range(3):

            def closure(ddp: DDP = ddp, sgd: Any = sgd, step: int = step) -> Tensor:
                sgd.zero_grad()
                loss = ddp(data(step)).square().mean()
                loss.backward()
                return loss

            if with_closure:
                assert sgd.step(closure) > 0
            else:
                closure()
                sgd.step()
    same(*nets)


def an_interrupted_step_is_not_saved() -> None:
    ddp = DDP(Net())
    sgd = torch.optim.SGD(ddp.parameters(), **SGD)
    dgc.register(ddp, sgd, CONFIG)
    ddp(data(0)).sum().backward()
    with (
        patch("torch.optim.sgd.sgd", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        sgd.step()
    (group,) = sgd.state_dict()["param_groups"]
    assert {key: group[key] for key in SGD} == SGD


def refuses_to_drop_what_is_in_the_memory() -> None:
    """As a GAN that clears its discriminator's gradient after its generator's backward pass."""
    ddp = ddp_of(Net())
    sgd = torch.optim.SGD(ddp.parameters(), **SGD)
    state = dgc.register(ddp, sgd, CONFIG)
    for step in range(2):
        ddp(data(step)).square().mean().backward()
        with pytest.raises(StateError, match="lacks what is sent"):
            state.state_dict()
        sgd.step()
        sgd.zero_grad()
        with ddp.no_sync():
            ddp(data(step + 10)).square().mean().backward()
        sgd.zero_grad()
    saved = state.state_dict()
    ddp(data(2)).square().mean().backward()
    state.load_state_dict(saved)  # the step is given up
    sgd.zero_grad()
    ddp(data(2)).square().mean().backward()
    sgd.zero_grad()
    with pytest.raises(GradientError, match=r"no step\(\) was made"):
        sgd.step()
    with pytest.raises(GradientError, match=r"no step\(\) was made"):
        ddp(data(3)).square().mean().backward()


def models_are_copied_and_pickled() -> None:
    ddp = ddp_of(Net())
    dgc.register(ddp, torch.optim.SGD(ddp.parameters(), **SGD), CONFIG)
    average = torch.optim.swa_utils.AveragedModel(ddp)
    file = io.BytesIO()
    torch.save(ddp, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (average.module, loaded):
        same(ddp.module, other.module)


def refuses() -> None:
    def sgd_of(net: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(net.parameters(), **SGD)

    ddp = DDP(Net())
    dgc.register(ddp, sgd_of(ddp))
    with pytest.raises(ConfigError, match="has a communication hook already"):
        dgc.register(ddp, sgd_of(ddp))
    ddp = DDP(Net())
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    with pytest.raises(ConfigError, match="a built-in one"):
        dgc.register(ddp, sgd_of(ddp))
    ddp = DDP(Net())
    with pytest.raises(ConfigError, match="does not train"):
        dgc.register(ddp, sgd_of(ddp.module.last))
    net = Net()
    DDP._set_params_and_buffers_to_ignore_for_model(net, ["extra.weight"])
    with pytest.raises(ConfigError, match=r"DDP ignores extra\.weight"):
        dgc.register(DDP(net), sgd_of(net))
    ddp = DDP(Net())
    with pytest.raises(ConfigError, match=r"momentum_correction=False"):
        dgc.register(ddp, torch.optim.NAdam(ddp.parameters()))
    optimizer = dgc.DistributedOptimizer(
        sgd_of(ddp.module), ddp.module.named_parameters(), CONFIG, TorchCommunicator()
    )
    with pytest.raises(ConfigError, match="applies momentum itself"):
        dgc.register(ddp, optimizer)
    with pytest.raises(ConfigError, match="different configurations"):
        dgc.register(ddp, sgd_of(ddp), dgc.DGC(density=0.1 / (1 + dist.get_rank())))


def frozen_before_ddp_is_left_alone_and_later_refused() -> None:
    def ddp_of(now: bool, later: bool) -> tuple[DDP, torch.optim.SGD]:
        net = Net()
        net.extra.requires_grad_(now)
        ddp = DDP(net, find_unused_parameters=True)
        net.extra.requires_grad_(later)
        sgd = torch.optim.SGD(net.parameters(), **SGD)
        dgc.register(ddp, sgd, CONFIG)
        return ddp, sgd

    ddp, sgd = ddp_of(now=False, later=False)
    ddp(data(0)).sum().backward()
    sgd.step()
    assert torch.equal(ddp.module.extra.weight, Net().extra.weight)
    for now, message in ((True, "DDP exchanges the gradient"), (False, "DDP does not exchange")):
        ddp, _ = ddp_of(now, later=not now)
        with pytest.raises(ConfigError, match=message):
            ddp(data(0)).sum().backward()


CHECKS = [
    equals_the_optimizer,
    equals_the_optimizer_in_mixed_dtypes,
    equals_the_optimizer_with_unused_parameters,
    dense_equals_ddp,
    keeps_mass_of_unused_parameters,
    joins_uneven_inputs,
    notices_a_missing_zero_grad,
    notices_a_step_without_exchange,
    skips_together,
    resumes_bit_for_bit,
    takes_a_closure,
    an_interrupted_step_is_not_saved,
    refuses_to_drop_what_is_in_the_memory,
    models_are_copied_and_pickled,
    refuses,
    compiles,
    frozen_before_ddp_is_left_alone_and_later_refused,
]
