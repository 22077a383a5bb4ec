"""FSDP2 on 2 × 2 gloo ranks, for tests/train/test_fsdp2.py."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint as checkpointed

import dgc
from dgc.errors import ConfigError, GradientError, StateError
from dgc.train import checkpoint

EXACT = dgc.DGC(density=1.0, value_bits=32, momentum_masking=False)
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


def mesh_of() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def net() -> nn.Sequential:
    """Its last bias has one element: the second rank of a shard group has none of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 1))


def sharded(mesh: DeviceMesh) -> Any:
    model = net()
    if dist.get_rank() >= 2:  # another start than the copy's: apply_fsdp2 must set it right
        with torch.no_grad():
            model[0].weight.add_(1)
    fully_shard(model[2], mesh=mesh["shard"])
    return fully_shard(model, mesh=mesh["shard"])


def data(step: int, rank: int | None = None) -> Tensor:
    seed = 100 * step + (dist.get_rank() if rank is None else rank)
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def start(config: Any = EXACT, adam: bool = False, **options: Any) -> tuple[Any, Any, Any]:
    mesh = mesh_of()
    model = sharded(mesh)
    sgd: Any = torch.optim.SGD(model.parameters(), **{**SGD, **options})
    if adam:
        sgd = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, sgd, dgc.apply_fsdp2(model, mesh["replicate"].get_group(), sgd, config)


def full(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() for p in model.parameters()]


def same_on_all_ranks(model: nn.Module) -> None:
    mine = torch.cat([p.reshape(-1) for p in full(model)])
    all_ = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_, mine)
    assert all(torch.equal(mine, other) for other in all_)


def equals_the_exact_mean() -> None:
    """Against one process that sees the data of all ranks, with two passes a step."""
    for momentum in (0.0, 0.9):
        options = {**SGD, "momentum": momentum, "nesterov": momentum > 0}
        model, sgd, state = start(**options)
        twin = net()
        theirs = torch.optim.SGD(twin.parameters(), **options)
        for step in range(4):
            for each in range(2):
                model.set_requires_gradient_sync(each == 1)
                model(data(2 * step + each)).square().mean().backward()
                for rank in range(4):
                    (twin(data(2 * step + each, rank)).square().mean() / 4).backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                if not momentum:
                    torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-6)
            sgd.step(), theirs.step()
            sgd.zero_grad(), theirs.zero_grad()
            for p, q in zip(full(model), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert state.stats()["steps"] == 4
        same_on_all_ranks(model)


def trains_compressed_and_resumes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        resumes(dgc.DGC(density=0.1, min_selected=1, state_dtype=dtype))


def resumes(config: dgc.DGC, adam: bool = False) -> None:
    model, sgd, state = start(config, adam)
    losses, halves = [], {}
    for step in range(40):
        if step == 20:
            parts = model.state_dict(), sgd.state_dict(), state.state_dict()
            halves = copy.deepcopy(dict(zip("moc", parts, strict=True)))
        sgd.zero_grad()
        loss = (model(data(step)) - 1).square().mean()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        sgd.step()
        losses.append(float(loss))
    assert sum(losses[-5:]) < sum(losses[:5]) / 2, losses
    assert state.stats()["sent_bytes"] < state.stats()["dense_bytes"]
    same_on_all_ranks(model)
    with pytest.raises(ConfigError, match="2 of the job's 4 ranks"):
        checkpoint.save(state, "nowhere")
    again, sgd, state = start(config, adam)
    with pytest.raises(StateError, match="of shard"):
        state.load_state_dict({**halves["c"], "shard": 1 - dist.get_rank() % 2})
    assert all(type(t) is Tensor for t in halves["c"]["local_momentum"].values())
    again.load_state_dict(halves["m"]), sgd.load_state_dict(halves["o"])
    state.load_state_dict(halves["c"])
    for step in range(20, 40):
        sgd.zero_grad(set_to_none=False)
        (again(data(step)) - 1).square().mean().backward()
        clip_grad_norm_(again.parameters(), 1.0)
        sgd.step()
    assert all(map(torch.equal, full(model), full(again)))


def trains_and_resumes_with_adamw() -> None:
    resumes(dgc.DGC(density=0.1, min_selected=1, exclude=("0.*",)), adam=True)


def skips_together() -> None:
    model, sgd, state = start(dgc.DGC(density=0.1))
    for step in range(3):
        before = full(model)
        bad = step == 1 and dist.get_rank() == 3
        sgd.zero_grad()
        (model(data(step)).square().mean() * (torch.inf if bad else 1)).backward()
        sgd.step()
        assert all(map(torch.equal, before, full(model))) == (step == 1)
    assert state.stats()["skipped_steps"] == 1
    memory = state.state_dict()["memory"].values()
    assert all(tensor.isfinite().all() for each in memory for tensor in each.values())
    same_on_all_ranks(model)


def refuses() -> None:
    mesh = mesh_of()
    group = mesh["replicate"].get_group()
    hsdp = fully_shard(net(), mesh=mesh)
    with pytest.raises(ConfigError, match="native HSDP"):
        dgc.apply_fsdp2(hsdp, group, torch.optim.SGD(hsdp.parameters(), **SGD))
    model = sharded(mesh)
    sgd = torch.optim.SGD(model.parameters(), **SGD)
    with pytest.raises(ConfigError, match="replicate_group is"):
        dgc.apply_fsdp2(model, mesh["shard"].get_group(), sgd)
    with pytest.raises(ConfigError, match="clip_norm"):
        dgc.apply_fsdp2(model, group, sgd, dgc.DGC(clip_norm=1.0))
    part = nn.Sequential(fully_shard(nn.Linear(2, 2), mesh=mesh["shard"]))
    with pytest.raises(ConfigError, match="the model is a Sequential"):
        dgc.apply_fsdp2(part, group, sgd)
    with pytest.raises(ConfigError, match="does not train"):
        dgc.apply_fsdp2(model, group, torch.optim.SGD(model[0].parameters(), **SGD))
    dgc.apply_fsdp2(model, group, sgd)
    with pytest.raises(ConfigError, match="registered with dgc already"):
        dgc.apply_fsdp2(model, group, sgd)


class Checkpointed(nn.Sequential):
    """Keeps no activations: it runs each layer's forward pass again in the backward pass."""

    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for layer in self:
            x = checkpointed(layer, x, use_reentrant=self.reentrant)
        return x


def exchanges_once_where_activations_are_checkpointed() -> None:
    mesh, finals = mesh_of(), []
    for reentrant in (False, True):
        torch.manual_seed(0)
        model: Any = Checkpointed(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 1))
        model.reentrant = reentrant
        for layer in model:
            fully_shard(layer, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        sgd: Any = torch.optim.SGD(model.parameters(), **SGD)
        state = dgc.apply_fsdp2(model, mesh["replicate"].get_group(), sgd, EXACT)
        for step in range(3):
            sgd.zero_grad()
            model(data(step)).square().mean().backward()
            sgd.step()
        assert state.stats()["steps"] == 3
        finals.append(full(model))
    assert all(map(torch.equal, *finals))


def sets_frozen_parameters_right() -> None:
    mesh = mesh_of()
    model = sharded(mesh)
    model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, **SGD)
    dgc.apply_fsdp2(model, mesh["replicate"].get_group(), sgd, EXACT)
    same_on_all_ranks(model)


def notices_a_missing_zero_grad() -> None:
    model, sgd, _ = start()
    model(data(0)).square().mean().backward()
    sgd.step()
    inputs = data(1).requires_grad_()
    torch.autograd.grad(model(inputs).sum(), inputs)  # adds to none
    with pytest.raises(GradientError, match="zero_grad"):
        model(data(1)).square().mean().backward()


def skips_together_what_fp16_does_not_hold() -> None:
    mesh = mesh_of()
    model: Any = nn.Linear(4, 4, bias=False).half()
    fully_shard(model, mesh=mesh["shard"])
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    state = dgc.apply_fsdp2(model, mesh["replicate"].get_group(), sgd, EXACT)
    for _ in range(3):  # only the first two rows, which are one shard, are too large in the end
        sgd.zero_grad()
        (model(torch.eye(4).half())[:, :2] * 30_000.0).sum().backward()
        sgd.step()
    assert state.stats()["skipped_steps"] == 1
    assert all(p.isfinite().all() for p in full(model))


def looks_for_a_missing_zero_grad_before_a_pass_alone() -> None:
    """A hidden layer's output is one of the model's too: its gradient comes in the midst of a pass."""

    class Shows(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            hidden = self[1](self[0](x))
            return self[4](self[3](self[2](hidden))), hidden

    mesh = mesh_of()
    model: Any = Shows(*net())
    fully_shard(model[2], mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    sgd = torch.optim.SGD(model.parameters(), **SGD)
    state = dgc.apply_fsdp2(model, mesh["replicate"].get_group(), sgd, EXACT)
    for step in range(3):
        sgd.zero_grad()
        model(data(step))[0].square().mean().backward()
        sgd.step()
    assert state.stats()["steps"] == 3


def refuses_to_drop_what_is_in_the_memory() -> None:
    model, sgd, _ = start()
    model(data(0)).square().mean().backward()
    sgd.zero_grad()
    with pytest.raises(GradientError, match=r"no step\(\) was made"):
        model(data(1)).square().mean().backward()


def optimizer_states_are_saved_as_torch_does() -> None:
    """It makes an empty step at rate 0 where the optimizer's own state is empty, as it is here."""
    for adam in (False, True):
        model, sgd, state = start(adam=adam)
        for step in range(4):
            if step % 2:
                saved = get_optimizer_state_dict(model, sgd)
                set_optimizer_state_dict(model, sgd, saved)
            sgd.zero_grad()
            model(data(step)).square().mean().backward()
            sgd.step()
        assert state.stats()["steps"] == 4
        assert adam or not any("momentum_buffer" in each for each in sgd.state.values())
        twin, theirs, _ = start(adam=adam)
        for step in range(4):
            theirs.zero_grad()
            twin(data(step)).square().mean().backward()
            theirs.step()
        assert all(map(torch.equal, full(model), full(twin)))


CHECKS = [
    equals_the_exact_mean,
    trains_compressed_and_resumes,
    trains_and_resumes_with_adamw,
    skips_together,
    refuses,
    notices_a_missing_zero_grad,
    looks_for_a_missing_zero_grad_before_a_pass_alone,
    exchanges_once_where_activations_are_checkpointed,
    sets_frozen_parameters_right,
    skips_together_what_fp16_does_not_hold,
    refuses_to_drop_what_is_in_the_memory,
    optimizer_states_are_saved_as_torch_does,
]
