"""Models that wrappers, versions and layouts make unusual."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dgc.errors import ConfigError
from dgc.model import load, prune, save, share
from dgc.model.constrain import constrained


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))


def wrapped(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(checkpoint_wrapper(layer) for layer in model))


def test_wrappers_that_give_a_state_other_names(tmp_path: Path) -> None:
    model = share(prune(wrapped(make()), 0.5), {"0._checkpoint_wrapped_module": 3})
    save(model, tmp_path / "m")
    plain = load(make(1), tmp_path / "m")
    other = load(wrapped(make(2)), tmp_path / "m", constrain=True)
    for (name, weight), mine in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, mine), name
    assert [type(c).__name__ for _, c in constrained(other)] == ["Shared", "Mask"]


def test_tied_weights_under_their_other_name_are_constrained(tmp_path: Path) -> None:
    def tied(first: str, second: str) -> nn.ModuleDict:
        layers = nn.ModuleDict({first: nn.Linear(20, 20), second: nn.Linear(20, 20)})
        layers[second].weight = layers[first].weight
        return layers

    save(prune(tied("a", "b"), 0.5), tmp_path / "m")
    model = load(tied("b", "a"), tmp_path / "m", constrain=True)
    assert len(constrained(model)) == 1


class Versioned(nn.Linear):
    """Its states of before version 2 are converted when they are loaded."""

    _version = 2

    def _load_from_state_dict(
        self, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any], *args: Any
    ) -> None:
        if metadata.get("version") is None:
            state[prefix + "bias"] = state[prefix + "bias"] + 1
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_a_state_is_of_the_version_that_the_modules_have(tmp_path: Path) -> None:
    model = Versioned(4, 4)
    save(model, tmp_path / "m")
    assert torch.equal(load(Versioned(4, 4), tmp_path / "m").bias, model.bias)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_layout_that_a_file_does_not_hold(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("weight", torch.eye(4).to_sparse_csr())
    with pytest.raises(ConfigError, match="give dense tensors"):
        save(model, tmp_path / "m")


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = make()
    for act in (prune, share):
        with pytest.raises(ConfigError, match="load the weights first"):
            act(model)


def test_options_of_weights_that_are_not_chosen() -> None:
    with pytest.raises(ConfigError, match=r"structure of 1\.weight, which has no density"):
        prune(make(), {"0": 0.5}, structure={"1": 0.5})
    with pytest.raises(ConfigError, match=r"penalty of 1\.weight, which has no bits"):
        share(make(), {"0": 3}, penalty={"1": 0.5})
