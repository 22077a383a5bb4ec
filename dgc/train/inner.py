"""The user's own optimizer: what it tells the memory, and its step with momentum applied once."""

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, Optimizer

from dgc.comm.base import Communicator
from dgc.config import DGC, Compression
from dgc.errors import ConfigError, GradientError, StateError
from dgc.train.adam import AdamSteps, check_adam
from dgc.train.bucket import Row
from dgc.train.momentum import Momentum, Owned, SgdMomentum
from dgc.train.plan import is_excluded
from dgc.train.reducer import Reducer

_KNOWN = (SGD, Adam)  # AdamW is an Adam


class InnerStep:
    """Prepares an optimizer for a step with the mean gradient, and restores it afterwards.

    With momentum correction the options (SGD's momentum with Nesterov, dampening and weight decay;
    all of Adam's) are read from its param groups at each step, so schedulers keep working, and kept
    from being applied again.

    Args:
        optimizer: the optimizer that applies the mean.
        params: what it trains, by name.
        config: who owns momentum, and whether the learning rate is folded in.
        world_size: number of ranks.
        scaler: the `torch.amp.GradScaler` that scales the loss; None if none does.

    Raises:
        ConfigError: the optimizer would apply momentum a second time.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        params: Mapping[str, Parameter],
        config: Compression,
        world_size: int,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.optimizer, self.params, self.config, self.scaler = optimizer, params, config, scaler
        self.owns_momentum = isinstance(config, DGC) and config.momentum_correction
        self.regroup()
        self.local: Momentum = SgdMomentum()
        self.adam = AdamSteps(world_size)
        if self.owns_momentum and isinstance(optimizer, Adam):
            self.local = self.adam
        self._sent_lr: dict[int, float] = {}
        self._last_lr: dict[int, float] = {}  # that was not 0
        self._with_momentum: set[str] = set()  # had such a step: dampening starts with the second
        self._loss_scale: float | None = None
        self._masked: Mapping[str, float] = {}  # in this step
        # Of each group what `before` replaced, and by what.
        self._replaced: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []

    def regroup(self) -> None:
        """Find each parameter's group; `optimizer.load_state_dict` replaces the groups."""
        self._groups = self.optimizer.param_groups
        self._group = {p: g for g in self._groups for p in g["params"]}

    def reducer(self, params: Mapping[str, Parameter], comm: Communicator) -> Reducer:
        """What exchanges the gradients of `params` for this step."""
        config, row, enter = self.memory_config, self.row, self.enter_
        return Reducer(params, config, comm, row, lambda: self.loss_scale, enter)

    @property
    def memory_config(self) -> Compression:
        """The configuration of the memory, which keeps no u where there is no momentum to keep."""
        if isinstance(self.config, DGC) and self.owns_momentum and not self.local.in_memory:
            return replace(self.config, momentum_correction=False)
        return self.config

    @property
    def loss_scale(self) -> float:
        """By what the gradients of this step are too large."""
        if self._loss_scale is None:  # read once a step: it waits for a GPU
            self._loss_scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        return self._loss_scale

    def exchanged(self) -> None:
        """The exchange is over: the scaler may change its scale from here on."""
        self._loss_scale = None

    def row(self, name: str) -> Row:
        """How the gradient of `name` enters the memory now, unscaled."""
        config, group = self.config, self._group_of(name)
        if not isinstance(config, DGC) or is_excluded(name, config):
            return Row()
        gain, lr, divisor = 1 / self.loss_scale, 1.0, 1.0
        if config.fold_lr:
            lr = self._sent_lr[id(group)] = float(group["lr"])
            divisor = 1.0 if self._adds_steps else self._divisor(group)
        own = Row()
        if self.owns_momentum:
            own = self.local.row(self.params[name], group, first=name not in self._with_momentum)
        if (gain, lr, divisor) == (1.0, 1.0, 1.0):
            return own
        return own._replace(gain=own.gain * gain, lr=lr, applied_lr=own.applied_lr * gain * divisor)

    @property
    def _adds_steps(self) -> bool:
        """Whether what arrives is a step and no gradient."""
        return self.owns_momentum and self.local is self.adam

    @property
    def _unit(self) -> str:
        """What the residual is made of."""
        made_of = "step" if self._adds_steps else "gradient"
        return (
            f"lr * {made_of}" if isinstance(self.config, DGC) and self.config.fold_lr else made_of
        )

    def enter_(
        self, names: Sequence[str], grads: Sequence[Tensor], rows: Sequence[Row]
    ) -> tuple[list[Tensor], list[Row]]:
        """What enters the memory for the gradients of a bucket, which may be overwritten, and how."""
        if not self._adds_steps or not names or is_excluded(names[0], self.config):
            return list(grads), list(rows)
        owned = [Owned(name, self.params[name], self._group_of(name)) for name in names]
        return self.adam.enter_(owned, grads, rows)

    def _divisor(self, group: dict[str, Any]) -> float:
        """The rate at which what arrives is applied.

        At rate 0 nothing enters. SGD whose momentum is here still applies what is left over, with
        step 1; others, for which a step of 1 has another meaning, do not move, and it enters their
        moments.
        """
        lr = float(group["lr"])
        if lr:
            self._last_lr[id(group)] = lr
            return lr
        return 1.0 if self._at_rate_0_with_1 else self._last_lr.get(id(group), 1.0)

    def _group_of(self, name: str) -> dict[str, Any]:
        param = self.params[name]
        if self._groups is not self.optimizer.param_groups or param not in self._group:
            self.regroup()
        group: dict[str, Any] = self._group[param]
        return group

    @torch.no_grad()
    def before(self, masked: Mapping[str, float], idle: Collection[str] = ()) -> None:
        """Add the local share to `.grad` and set the options of this step; `after` restores them.

        Args:
            masked: of each name, what `Reducer.masked` says of this step.
            idle: the names of which it says so: they stay as they are.

        Raises:
            GradientError: a gradient of a parameter that is not exchanged.
        """
        self.local.forget()  # a step that raised did not get to `after`, and was applied in part
        self.restore_options()
        self.regroup()
        self._refuse_local_gradients()
        self._masked = masked
        if self.owns_momentum:
            moved = [
                name
                for name, param in self.params.items()
                if param.grad is not None and name not in idle
            ]
            owned = [self._owned(name) for name in moved]
            self.local.local_(owned)
            self._with_momentum.update(o.name for o in owned if o.group.get("momentum"))
        self.put_options()

    def put_options(self) -> None:
        """Set the options of this step alone; `after` restores them."""
        for group in self.optimizer.param_groups:
            put = self.local.without(group) if self.owns_momentum else {}
            if self._steps_with_one(group):
                put = {**put, "lr": 1.0}
            self._replaced.append((group, {key: group[key] for key in put}, put))
            group.update(put)

    def _refuse_local_gradients(self) -> None:
        exchanged = set(self.params.values())
        local = [
            p
            for p in self._group
            if p.grad is not None and p not in exchanged and (p.requires_grad or p.grad.any())
        ]
        if local:
            raise GradientError(
                f"{len(local)} parameters, the first of shape {tuple(local[0].shape)}, have gradients "
                "of this rank alone: they were frozen, or not the optimizer's yet, when dgc took it. "
                "Unfreeze or add first, then wrap or register (or set their .grad to None)"
            )

    def after(self) -> None:
        """The step is over: give options and gradients back."""
        self.restore_options()
        self.local.after(self.params)

    def restore_options(self) -> None:
        """Give the param groups their own options back, but for those that were set since."""
        for group, own, put in self._replaced:
            group.update({key: own[key] for key in put if group.get(key) == put[key]})
        self._replaced.clear()

    def _owned(self, name: str) -> Owned:
        group = self._group_of(name)
        excluded, scale = is_excluded(name, self.config), 1.0 - self._steps_with_one(group)
        if self._adds_steps and isinstance(self.config, DGC) and not self.config.fold_lr:
            scale = float(group["lr"])
        masked = self._masked.get(name, 0.0)
        first = name not in self._with_momentum
        return Owned(name, self.params[name], group, excluded, masked, scale, first)

    def _steps_with_one(self, group: dict[str, Any]) -> bool:
        """Whether what arrived is applied as it is, as the learning rate was 0 when it was sent."""
        return self._at_rate_0_with_1 and self._sent_lr.get(id(group)) == 0

    @property
    def _at_rate_0_with_1(self) -> bool:
        return self.owns_momentum and isinstance(self.optimizer, SGD)

    def state_dict(self) -> dict[str, Any]:
        """What the wrapped optimizer's own state lacks, by parameter name."""
        return {
            "unit": self._unit,
            "local_momentum": {name: b.clone() for name, b in self.local.buffers.items()},
            "with_momentum": sorted(self._with_momentum),
            "second_moments": {name: s.clone() for name, s in self.adam.seconds.items()},
            "updates": {name: int(count) for name, count in self.adam.updates.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; `check_state` first."""
        self.regroup()
        buffers = state["local_momentum"]
        self.local.buffers = {n: b.clone().to(self.params[n]) for n, b in buffers.items()}
        self._with_momentum = set(state["with_momentum"])
        seconds = {
            n: s.to(self.params[n].device, torch.float32, copy=True)
            for n, s in state["second_moments"].items()
        }
        self.adam.seconds = seconds
        self.adam.updates = {
            name: torch.tensor(state["updates"][name], dtype=torch.float64, device=second.device)
            for name, second in seconds.items()
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `StateError` if `state` is for another model, or its residuals of another kind."""
        if state["unit"] != self._unit:
            raise StateError(
                f"the residuals of this state are in units of {state['unit']}, here of {self._unit}: "
                "load it with the fold_lr and momentum_correction that wrote it"
            )
        for name, buffer in state["local_momentum"].items():
            if name not in self.params:
                raise StateError(f"this state has momentum for {name}, which is not trained here")
            found, wanted = tuple(buffer.shape), tuple(self.params[name].shape)
            if found != wanted:
                raise StateError(f"the momentum of {name} in this state is {found}, here {wanted}")
        for name, second in state["second_moments"].items():
            residual = state["memory"].get(name, {}).get("v", second[:0])
            found, wanted = second.numel(), residual.numel()
            if found != wanted or name not in state["updates"]:
                raise StateError(
                    f"the second moment of {name} in this state has {found} elements, its residual "
                    f"{wanted}: it is of another model"
                )


def check_supported(
    optimizer: Optimizer, config: Compression, scaler: torch.amp.GradScaler | None
) -> None:
    """Refuse an optimizer that would apply momentum twice; warn of one that nobody has tried.

    Raises:
        ConfigError: says what was found and what to pass instead.
    """
    name = type(optimizer).__name__
    if not isinstance(config, DGC):
        return
    if not config.momentum_correction:
        if not isinstance(optimizer, _KNOWN):
            warnings.warn(
                f"{name} with compressed gradients has not been measured: it gets plain error "
                "feedback, momentum correction does not apply",
                stacklevel=3,
            )
        return
    kind = next((each for each in _KNOWN if isinstance(optimizer, each)), None)
    if kind is None:
        raise ConfigError(
            f"momentum correction needs torch.optim.SGD, Adam or AdamW, this is {name}: pass "
            "compression=dgc.DGC(momentum_correction=False) to leave momentum to the optimizer"
        )
    # Unwrapped: torch wraps `step` of each class that it has made an instance of.
    if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(kind.step):
        raise ConfigError(
            f"{name} overrides {kind.__name__}.step and may apply momentum a second time: "
            f"use torch.optim.{kind.__name__}, or dgc.DGC(momentum_correction=False)"
        )
    if kind is Adam:
        for group in optimizer.param_groups:
            check_adam(group)
    if any("momentum_buffer" in each for each in optimizer.state.values()):
        raise ConfigError(
            "the optimizer has momentum of earlier steps, which would be applied beside the "
            "memory's: wrap it before its first step, or load the state through the wrapper"
        )
    if scaler is not None and any(group.get("fused") for group in optimizer.param_groups):
        raise ConfigError(
            f"{name}(fused=True) unscales inside its step, after the local share of momentum was "
            "added: with a GradScaler use fused=False"
        )


class RefuseScaler:
    """In the place of `_step_supports_amp_scaling`, which GradScaler.step looks at first."""

    def __bool__(self) -> bool:
        raise ConfigError(
            "a GradScaler steps this optimizer, but the loss scale is unknown where gradients enter "
            "the memory, which would mix gradients of different scales: pass scaler=scaler to "
            "dgc.DistributedOptimizer or dgc.register"
        )
