"""What gloo ranks check of distributed checkpoints; run by test_checkpoint.py."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import dgc
from dgc.comm.torch_dist import TorchCommunicator
from dgc.train import checkpoint
from tests.train.hook_checks import CONFIG, SGD, Net, data, ddp_of, same


def hooked() -> tuple[nn.Module, torch.optim.SGD, Any]:
    ddp = ddp_of(Net())
    sgd = torch.optim.SGD(ddp.parameters(), **SGD)
    return ddp, sgd, dgc.register(ddp, sgd, CONFIG)


def train(ddp: nn.Module, sgd: Any, steps: range) -> None:
    for step in steps:
        sgd.zero_grad()
        ddp(data(step)).square().mean().backward()
        sgd.step()


def mean_memory(state: Any) -> dict[str, torch.Tensor]:
    """For each parameter, u and v summed over ranks, divided by the world size, in float64."""
    found = {}
    for name, tensors in state.state_dict()["memory"].items():
        for key, tensor in tensors.items():
            total = tensor.double()
            dist.all_reduce(total)
            found[f"{name} {key}"] = total / dist.get_world_size()
    return found


def saves(folder: str) -> dict[str, Any]:
    """Train, save twice over; returns the mean memory."""
    ddp, sgd, state = hooked()
    train(ddp, sgd, range(5))
    checkpoint.save(state, folder)
    resumed, other_sgd, other = hooked()
    resumed.load_state_dict(ddp.state_dict())
    other_sgd.load_state_dict(sgd.state_dict())
    checkpoint.load(other, folder)
    for model, optimizer in ((ddp, sgd), (resumed, other_sgd)):
        train(model, optimizer, range(5, 8))
    same(ddp, resumed)
    checkpoint.load(state, folder)
    return {name: mean.tolist() for name, mean in mean_memory(state).items()}


def resizes(folder: str, wanted: dict[str, Any]) -> None:
    """Load what another number of ranks saved; the mean memory is `wanted`, and training goes on."""
    ddp, sgd, state = hooked()
    checkpoint.load(state, folder)
    for name, mean in mean_memory(state).items():
        expected = torch.tensor(wanted[name], dtype=torch.float64)
        torch.testing.assert_close(mean.cpu(), expected, rtol=1e-5, atol=1e-8)
    train(ddp, sgd, range(5, 8))
    assert state.stats()["steps"] == 3


def wrapper_resumes(folder: str) -> None:
    """The wrapper's own state, the wrapped optimizer's in it, through the same functions."""
    nets, optimizers = [Net(), Net()], []
    for net in nets:
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        config = dgc.DGC(density=0.1, min_selected=1)
        optimizers.append(
            dgc.DistributedOptimizer(adam, net.named_parameters(), config, TorchCommunicator())
        )
    train(nets[0], optimizers[0], range(3))
    checkpoint.save(optimizers[0], folder)
    nets[1].load_state_dict(nets[0].state_dict())
    checkpoint.load(optimizers[1], folder)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(3, 6))
    same(*nets)
