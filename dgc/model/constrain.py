"""Constraints on a parameter that hold whatever its optimizer does: masks and shared values.

The parameter itself stays an ordinary `nn.Parameter`, so optimizers, `named_parameters` and
state-dict keys are what they were. A constraint is enforced in three places:

- a gradient hook, before the gradient is accumulated (so DDP reduces the constrained gradient);
- after the `step` of any `torch.optim.Optimizer` (momentum gathered earlier and weight decay);
- before each forward pass and each `state_dict`, for optimizers of any other kind.

What defines the constraint is a buffer of the module that owns the parameter, so `state_dict`,
`.to(device)`, DDP and `deepcopy` carry it. Tensor hooks are not carried by `deepcopy` or pickle;
the forward hook, which is, installs them on the copy's own parameter.
"""

import sys
from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from dgc.errors import ConfigError

# Which module constrains a parameter: found again on every forward pass, so only a cache.
_owners: Any = WeakIdKeyDictionary()
_step_hook: list[Any] = []
_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # not in torch 2.6


class Constraint:
    """What the parameter `name` of its module must satisfy; the module is handed in, not held.

    Subclasses say which buffer they keep (`suffix`), what happens to a gradient and how values are
    brought back in place.
    """

    suffix = ""
    called = False  # whether the owner's own forward ran since `Binder` looked last

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def buffer_name(self) -> str:
        """The buffer of the owning module that defines this constraint."""
        return f"{self.name}_{self.suffix}"

    def buffer(self, module: nn.Module) -> Tensor:
        return module.get_buffer(self.buffer_name)

    def gradient(self, buffer: Tensor, grad: Tensor) -> Tensor:
        """The gradient, shaped as the parameter, that keeps the constraint under SGD."""
        raise NotImplementedError

    def project_(self, buffer: Tensor, values: Tensor) -> None:
        """Overwrite `values` with the nearest that satisfy the constraint; idempotent."""
        raise NotImplementedError

    def __call__(self, module: nn.Module, _inputs: Any = None) -> None:
        """Forward pre-hook of the owning module."""
        self.called = True
        self.hold(module)

    def hold(self, module: nn.Module) -> None:
        """Hook the gradient and overwrite the parameter with its projection."""
        if _exporting():  # the trace has stand-ins for the parameters, and would not see the values
            raise ConfigError(
                f"torch.export of {type(module).__name__}, whose {self.name!r} is constrained: "
                "lift the constraints first, by dgc.model.release(model); the values stay"
            )
        if not self._replaced(module):
            self.bind(module)
            self.enforce_(module)

    def _replaced(self, module: nn.Module) -> bool:
        """Whether another tensor stands in for the parameter during this call.

        As in `torch.func.functional_call` and the replicas of `nn.DataParallel`: such tensors are
        not in place to change, and what they were made of is constrained.
        """
        own = getattr(module, self.name, None)
        if isinstance(own, nn.Parameter):
            owner, constraint, _ = _owners.get(own, (None, None, None))
            ours = owner is not None and owner() is module and constraint is self
            return not ours and _in_functional_call()
        if module._parameters.get(self.name) is not None or hasattr(module, "_is_replica"):
            return True
        kind = type(module).__name__
        raise ConfigError(
            f"{self.name!r} of {kind} is constrained and no longer a parameter: parametrize it "
            f"(weight_norm, torch.nn.utils.prune) before dgc.prune and dgc.share, or not at all"
        )

    def before_state_dict(self, module: nn.Module, *_: Any) -> None:
        """State-dict pre-hook of the owning module."""
        self.enforce_(module)

    def enforce_(self, module: nn.Module) -> None:
        """Overwrite the parameter with its projection."""
        if self._replaced(module):
            return
        # Through .data: the projection changes nothing that a pending backward pass has read
        # (it is idempotent), and so must not look to autograd as if it did.
        parameter = module.get_parameter(self.name)
        if is_sharded(parameter):
            raise ConfigError(
                f"{self.name!r} of {type(module).__name__} is constrained and was sharded since: lift "
                "the constraints by dgc.model.release(model), and prune and share models that are not"
            )
        self.project_(self.buffer(module), parameter.data)

    def bind(self, module: nn.Module) -> None:
        """Hook the gradient of the parameter, once."""
        parameter = module.get_parameter(self.name)
        weak_owner, constraint, hooked = _owners.get(parameter, (None, None, None))
        same = weak_owner is not None and weak_owner() is module and constraint is self
        if same and (hooked is not None or not parameter.requires_grad):
            return
        if hooked is not None:
            hooked.remove()
        _install_step_hook()
        weak = ref(module)

        def constrain(grad: Tensor) -> Tensor:
            live = weak()
            return grad if live is None else self.gradient(self.buffer(live), grad)

        # A frozen parameter takes no hook: it gets one in the first forward pass after that.
        handle = parameter.register_hook(constrain) if parameter.requires_grad else None
        _owners[parameter] = (weak, self, handle)

    def refuse_taken(self, module: nn.Module) -> None:
        """Raise a `ConfigError` if `module` uses the name of the buffer for something else."""
        earlier = constraint_of(module, self.name)
        own = earlier is not None and earlier.buffer_name == self.buffer_name
        if hasattr(module, self.buffer_name) and not own:
            kind = type(module).__name__
            raise ConfigError(f"{kind} has a {self.buffer_name!r} of its own: dgc needs that name")

    def install(self, module: nn.Module, buffer: Tensor) -> None:
        """Constrain `module`'s parameter, replacing any earlier constraint on it.

        Raises:
            ConfigError: if the module has something of its own by the name of the buffer.
        """
        self.refuse_taken(module)
        remove(module, self.name)
        module.register_buffer(self.buffer_name, buffer)
        module.register_forward_pre_hook(self)
        module.register_state_dict_pre_hook(self.before_state_dict)
        self.hold(module)


def _in_functional_call() -> bool:
    """Whether this is inside `torch.func.functional_call`, which may put in another model's parameters."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _functional_call.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


class Binder:
    """Forward pre-hook of the root: reaches modules whose own `forward` is never called.

    `nn.MultiheadAttention` reads its output projection's weight without calling it.
    """

    def __call__(self, module: nn.Module, _inputs: Any = None) -> None:
        for owner, constraint in constrained(module):
            if not constraint.called:  # in the pass before
                constraint.hold(owner)
            constraint.called = False


def bind_root(model: nn.Module) -> None:
    """Let every forward pass of `model` look after the constraints inside it."""
    if not any(isinstance(hook, Binder) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(Binder())


def _install_step_hook() -> None:
    if not _step_hook:
        _step_hook.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owner = _owners.get(parameter)
            module = owner[0]() if owner is not None else None
            if module is not None:
                owner[1].enforce_(module)


def constrained(model: nn.Module) -> list[tuple[nn.Module, Constraint]]:
    """Every (owning module, constraint) inside `model`."""
    return [
        (module, hook)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, Constraint)
    ]


def constraint_of(module: nn.Module, name: str) -> Constraint | None:
    """The constraint on `module`'s own parameter `name`, if any."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, Constraint) and hook.name == name:
            return hook
    return None


def remove(module: nn.Module, name: str) -> None:
    """Lift the constraint on `module`'s own parameter `name`, if any; values stay."""
    constraint = constraint_of(module, name)
    if constraint is None:
        return
    parameter = module._parameters.get(name)  # None where it was parametrized since
    if parameter is not None and constraint.buffer_name in module._buffers:
        if not is_sharded(parameter):
            constraint.enforce_(module)
        delattr(module, constraint.buffer_name)
    for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if hook is constraint or getattr(hook, "__self__", None) is constraint:
                del hooks[key]
    hooked = None if parameter is None else _owners.pop(parameter, (None, None, None))[2]
    if hooked is not None:
        hooked.remove()


def release(model: nn.Module) -> None:
    """Lift every constraint in `model`: weights keep their values and train freely again.

    Example:
        >>> from dgc.model import prune
        >>> layer = prune(nn.Linear(4, 2, bias=False), density=0.5)
        >>> release(layer)
        >>> list(layer.state_dict())
        ['weight']
    """
    for module, constraint in constrained(model):
        remove(module, constraint.name)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, Binder):
            del model._forward_pre_hooks[key]


def weights_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Full name → (owning module, own name) of each distinct parameter that is a weight.

    That is one of two or more dimensions, the first not being the only one above 1, as in gains that
    are stored as columns. These are what `prune` and `share` act on unless told otherwise: biases,
    norms and gains are few, and worth their bits.

    Example:
        >>> list(weights_of(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))))
        ['0.weight']
    """
    return {
        name: _owner(model, name)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.shape[1:].numel() != 1
    }


def choose(
    model: nn.Module, setting: float | int | dict[str, Any], what: str
) -> dict[str, tuple[nn.Module, str, Any]]:
    """Full name → (owner, own name, setting): a number is for all weights, a dict for those named.

    A layer's name (`"fc1"`) stands for its weight (`"fc1.weight"`).

    Raises:
        ConfigError: if a name is not a parameter of `model`, or a parameter is sharded.
    """
    for name, parameter in model.named_parameters():
        refuse_sharded(parameter, name)
        if parameter.is_meta:
            raise ConfigError(
                f"{name!r} is on the device meta, without values: load the weights first"
            )
        if 0 in [
            s for s, size in zip(parameter.stride(), parameter.shape, strict=True) if size > 1
        ]:
            raise ConfigError(f"elements of {name!r} share memory (expand): take its clone()")
    if not isinstance(setting, dict):
        weights = weights_of(model)
        if not weights:
            raise ConfigError(
                f"no weights of more than a column (see weights_of): give {what} by name"
            )
        return {name: (*owner, setting) for name, owner in weights.items()}
    names = dict(model.named_parameters())
    chosen = {}
    for given, value in setting.items():
        name = given if given in names else f"{given}.weight"
        if name not in names:
            raise ConfigError(f"no parameter {given!r} for {what}: the model has {sorted(names)}")
        if name in chosen:
            raise ConfigError(f"{what} of {name} is given twice: by its name and by its layer's")
        if not names[name].is_floating_point():
            raise ConfigError(
                f"{name} is {names[name].dtype}: give {what} of floating parameters alone"
            )
        chosen[name] = (*_owner(model, name), value)
    return chosen


def refuse_others(names: Iterable[str], chosen: Iterable[str], what: str, by: str) -> None:
    """Raise a `ConfigError` if `what` is given for a name that `by` is not: it would do nothing."""
    if others := sorted(set(names) - set(chosen)):
        raise ConfigError(f"{what} of {others[0]}, which has no {by}: give it one, or leave it out")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`."""
    # By name: its module is slow to import, and not in every build of torch.
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def refuse_sharded(tensor: Tensor, name: str) -> None:
    """Raise a `ConfigError` if `tensor`, called `name`, is a `DTensor`, as in FSDP2."""
    if is_sharded(tensor):
        raise ConfigError(
            f"{name!r} is sharded, a DTensor: gather the full state first, by "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "full_state_dict=True, into a model that is not sharded"
        )


def refuse_non_finite(module: nn.Module, own: str, name: str) -> None:
    """Raise a `ConfigError` if the parameter `own` of `module`, called `name`, has an inf or nan."""
    weight = module.get_parameter(own).detach()
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise ConfigError(f"{bad} elements of {name} are not finite: take an earlier state")


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own
