"""What two gloo ranks check of mixed precision; run by test_amp.py."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dgc
from dgc.comm.torch_dist import TorchCommunicator
from dgc.errors import ConfigError
from tests.core.on_device import DEVICE
from tests.train.hook_checks import CONFIG, SGD, Net, data, ddp_of, same, same_on_all_ranks

SCALE = 1024.0


def wrapped_by(how: str, scaler: Any, config: dgc.DGC = CONFIG) -> tuple[nn.Module, Any, Any]:
    """A model, the optimizer that the loop steps, and what has `stats` and `state_dict`."""
    net = Net()
    sgd = torch.optim.SGD(net.parameters(), **SGD)
    if how == "ddp":
        ddp = ddp_of(net)
        return ddp, sgd, dgc.register(ddp, sgd, config, scaler=scaler)
    optimizer = dgc.DistributedOptimizer(
        sgd, net.named_parameters(), config, TorchCommunicator(), scaler=scaler
    )
    return net, optimizer, optimizer


def train(how: str, scaler: Any, *, steps: int = 30, inf_at: int | None = None) -> Any:
    """The usual loop with a scaler; rank 1 finds an inf at step `inf_at`."""
    model, optimizer, state = wrapped_by(how, scaler)
    scales = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(data(step)).square().mean()
        if step == inf_at and dist.get_rank() == 1:
            loss = loss * torch.inf
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
    same_on_all_ranks(model)
    return getattr(model, "module", model), state, scales


def scaler_of(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(DEVICE.type, init_scale=SCALE, **options)


def one_inf_skips_one_step() -> None:
    nets = []
    for how in ("ddp", "optimizer"):
        net, state, scales = train(how, scaler_of(), inf_at=20)
        assert state.stats()["skipped_steps"] == 1
        assert scales == [SCALE] * 20 + [SCALE / 2] * 10
        for memory in state.state_dict()["memory"].values():
            assert all(tensor.isfinite().all() for tensor in memory.values())
        nets.append(net)
    same(*nets)


def a_scaler_changes_no_bit() -> None:
    for how in ("ddp", "optimizer"):
        plain = train(how, None, steps=8)[0]
        growing = train(how, scaler_of(growth_interval=3), steps=8)
        assert growing[2][-1] == 4 * SCALE
        same(plain, growing[0])
        same(plain, train(how, scaler_of(enabled=False), steps=8)[0])


def clips_after_unscale() -> None:
    nets = []
    for how in ("ddp", "optimizer"):
        scaler = scaler_of()
        model, optimizer, _ = wrapped_by(how, scaler)
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(model(data(step)).square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
        same_on_all_ranks(model)
        nets.append(getattr(model, "module", model))
    same(*nets)


def autocasts_to_bf16() -> None:
    nets = []
    for how in ("ddp", "optimizer"):
        model, optimizer, _ = wrapped_by(how, None)
        for step in range(6):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(data(step)).float().square().mean()
            loss.backward()
            optimizer.step()
        same_on_all_ranks(model)
        nets.append(getattr(model, "module", model))
    same(*nets)


def refuses_a_scaler_it_was_not_told_of() -> None:
    for how in ("ddp", "optimizer"):
        scaler = scaler_of()
        model, optimizer, _ = wrapped_by(how, None)
        scaler.scale(model(data(0)).square().mean()).backward()
        with pytest.raises(ConfigError, match="scaler=scaler"):
            scaler.step(optimizer)
    ddp = DDP(Net())
    fused = torch.optim.SGD(ddp.parameters(), **SGD, fused=True)
    with pytest.raises(ConfigError, match="fused=False"):
        dgc.register(ddp, fused, CONFIG, scaler=scaler_of())


CHECKS = [
    one_inf_skips_one_step,
    a_scaler_changes_no_bit,
    clips_after_unscale,
    autocasts_to_bf16,
    refuses_a_scaler_it_was_not_told_of,
]
