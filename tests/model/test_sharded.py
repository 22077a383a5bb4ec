"""Models whose parameters are DTensors are refused, and left as they are."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dgc.errors import ConfigError
from dgc.model import load, prune, prune_by_std, release, save, sensitivity, share
from tests.processes import run_processes


def refusals() -> list[str]:
    """The message of each use of a sharded model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.dgc")
        save(nn.Linear(9, 9), path)
        model = fully_shard(nn.Linear(9, 9), mesh=init_device_mesh("cpu", (1,)))
        uses: list[Callable[[], object]] = [
            lambda: load(model, path),
            lambda: save(model, path),
            lambda: prune(model, 0.5),
            lambda: prune_by_std(model, 0.5),
            lambda: share(model, 3),
            lambda: sensitivity(model, lambda m: 1.0),
        ]
        before = [parameter.full_tensor().clone() for parameter in model.parameters()]
        messages = []
        for use in uses:
            with pytest.raises(ConfigError) as caught:
                use()
            messages.append(str(caught.value))
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter.full_tensor(), old)
    return messages


def test_sharded_models_are_refused() -> None:
    (found,) = run_processes(1, {"refusals": refusals})["refusals"]
    assert isinstance(found, list), found
    assert len(found) == 6
    for message in found:
        assert message.startswith("'weight' is sharded, a DTensor: gather the full state first")


def sharded_after_pruning() -> list[str]:
    """What is said, until the constraints are lifted."""
    model = prune(nn.Sequential(nn.Linear(9, 9)), 0.5)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ConfigError) as caught:
        model.state_dict()
    release(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    model(torch.ones(1, 9)).sum().backward()
    return [str(caught.value)]


def test_a_pruned_model_that_is_sharded_says_how_to_go_on() -> None:
    ((found,),) = run_processes(1, {"sharded": sharded_after_pruning})["sharded"]
    assert "release(model)" in found
