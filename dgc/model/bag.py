"""A state dict as a module, for those who have a file of weights and no model class."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dgc.errors import ConfigError


def without_constraints(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the masks and codes that `prune` and `share` keep beside a weight.

    Known by name, dtype and shape, and by the weight's zeros, which they explain.

    Example:
        >>> weight = torch.ones(2, 2)
        >>> list(without_constraints({"weight": weight, "weight_mask": weight != 0}))
        ['weight']
    """
    own = {
        f"{name}_{suffix}"
        for suffix, dtype in (("mask", torch.bool), ("codes", torch.uint8))
        for name, weight in state.items()
        if (buffer := state.get(f"{name}_{suffix}")) is not None
        and (buffer.dtype, buffer.shape) == (dtype, weight.shape)
        and not weight[buffer == 0].any()
    }
    return {name: tensor for name, tensor in state.items() if name not in own}


def module_of(state: Mapping[str, Tensor], exclude: Collection[str] = ()) -> nn.Module:
    """A module tree whose `state_dict()` is `state`: floating tensors are parameters.

    It has no `forward`; `prune`, `share` and `save` take it like any model.

    Args:
        state: tensors by name.
        exclude: shell patterns of names that are buffers, which `prune` and `share` leave alone.

    Raises:
        ConfigError: if one name is a prefix of another, no module can hold it, or a pattern fits none.

    Example:
        >>> list(module_of({"fc.weight": torch.ones(2, 2), "steps": torch.tensor(3)}).state_dict())
        ['steps', 'fc.weight']
    """
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in state):
            raise ConfigError(f"no tensor is named {pattern!r}: there are {sorted(state)}")
    root = nn.Module()
    for name, tensor in state.items():
        *path, own = name.split(".")
        at = root
        try:
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            excluded = any(fnmatchcase(name, pattern) for pattern in exclude)
            if tensor.is_floating_point() and not excluded:
                at.register_parameter(own, nn.Parameter(tensor, requires_grad=False))
            else:
                at.register_buffer(own, tensor)
        except (KeyError, AttributeError) as error:
            raise ConfigError(f"{name!r} cannot be the name of a tensor: {error}") from error
    return root
