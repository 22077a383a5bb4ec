"""`DistributedOptimizer`: an optimizer whose step uses the mean gradient of all ranks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from dgc.comm.base import Communicator
from dgc.comm.runtime import default_communicator
from dgc.config import DGC, Compression
from dgc.errors import ConfigError, GradientError, StateError
from dgc.train.agree import check_agreement, named_parameters_of
from dgc.train.bucket import Row
from dgc.train.momentum import LocalMomentum
from dgc.train.reducer import Reducer, is_excluded

STATE_VERSION = 1
_NO_MOMENTUM = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}


class DistributedOptimizer(Optimizer):
    """Wraps an optimizer: gradients are exchanged during backward, `step` applies their mean.

    Parameters (and buffers, where given) are overwritten with those of rank 0 at construction.
    With momentum correction the momentum, Nesterov, dampening and weight decay of the wrapped SGD
    are read from its param groups at each step, so schedulers keep working, and applied once: here.

    Args:
        optimizer: torch.optim.SGD; any optimizer with `DGC(momentum_correction=False)` or `Dense`.
        named_parameters: `model.named_parameters()`, which must name all that `optimizer` trains.
        compression: `dgc.DGC(...)` or `dgc.Dense(...)`.
        comm: the ranks; None is the communicator of the last `dgc.init()`.
        named_buffers: `model.named_buffers()` to broadcast these too.

    Raises:
        ConfigError: an optimizer that would apply momentum twice, names or dtypes that do not
            work, or ranks that differ in model or configuration.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = DistributedOptimizer(sgd, model.named_parameters(), DGC(density=0.5))
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.stats()["steps"]
        1

    Source: Lin et al., Deep Gradient Compression, ICLR 2018, arXiv 1712.01887.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Parameter]],
        compression: Compression | None = None,
        comm: Communicator | None = None,
        *,
        named_buffers: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        # Optimizer.__init__ is not called: param_groups and state are those of the wrapped one.
        config = DGC() if compression is None else compression
        self.optimizer, self.config = optimizer, config
        self.owns_momentum = isinstance(config, DGC) and config.momentum_correction
        _check_supported(optimizer, self.owns_momentum)
        self.comm = comm or default_communicator()
        self.params = named_parameters_of(optimizer, named_parameters)
        check_agreement(self.params, config.describe(), self.comm)
        self._group = {p: g for g in optimizer.param_groups for p in g["params"]}
        self.reducer = Reducer(self.params, config, self.comm, self._row)
        self.local = LocalMomentum()
        self._sent_lr: dict[int, float] = {}
        self._with_momentum: set[str] = set()  # had a step: dampening starts with the second
        self._syncing, self._synchronized, self._apply = True, False, True
        self._broadcast(named_buffers)
        for name, param in self.params.items():
            param.register_post_accumulate_grad_hook(self._hook(name))

    def _broadcast(self, named_buffers: Iterable[tuple[str, Tensor]]) -> None:
        for tensor in [*self.params.values(), *(buffer for _, buffer in named_buffers)]:
            self.comm.broadcast_(tensor.detach())

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            if self._syncing:
                if self._synchronized:
                    raise GradientError(
                        "a backward pass between synchronize() and step(): its gradients would be "
                        "added to the mean. Call step() and zero_grad() first"
                    )
                self.reducer.ready(name)

        return ready

    def _row(self, name: str) -> Row:
        """How the gradient of `name` enters the memory now."""
        config, group = self.config, self._group[self.params[name]]
        if not isinstance(config, DGC) or is_excluded(name, config):
            return Row()
        lr, applied = 1.0, 1.0
        if config.fold_lr:
            # At rate 0 nothing enters, and what is left over is still applied as it is.
            lr = self._sent_lr[id(group)] = float(group["lr"])
            applied = lr if lr else 1.0
        if not self.owns_momentum:
            return Row(lr=lr, applied_lr=applied)
        gain = 1 - group["dampening"] if name in self._with_momentum else 1.0
        return Row(group["momentum"], gain, lr, group["nesterov"], applied)

    def synchronize(self) -> None:
        """Wait for the exchange; afterwards `.grad` holds the mean, to clip or look at.

        A parameter that no rank used keeps `.grad` None. Called by `step` where it was not before.

        Raises:
            CommError: another rank died or did not answer in time.
            GradientError: too many steps in a row with non-finite gradients.
            WireError: a message was damaged on its way.
        """
        if not self._synchronized:
            self._apply = self.reducer.finish()
            self._synchronized = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the mean gradient, unless all ranks skip the step for a non-finite one.

        Raises:
            ConfigError: if a closure is given; it would be run with gradients of one rank.
            What `synchronize` raises.
        """
        if closure is not None:
            raise ConfigError(
                "step() takes no closure: run the model and loss.backward() first, then step()"
            )
        if not self._syncing:
            raise GradientError("step() inside no_sync(): leave it before the last backward pass")
        self.synchronize()
        self._synchronized = False
        if not self._apply:
            return
        if not self.owns_momentum:
            self._step_inner({})
            return
        for name, param in self.params.items():
            if param.grad is not None:
                self._with_momentum.add(name)
                self._add_local(name, param)
        self._step_inner(_NO_MOMENTUM)

    def _add_local(self, name: str, param: Parameter) -> None:
        group = self._group[param]
        excluded, scale = is_excluded(name, self.config), 1 - self._steps_with_one(group)
        self.local.add_(name, param, group, excluded=excluded, scale=scale)

    def _steps_with_one(self, group: dict[str, Any]) -> bool:
        """Whether what arrived is applied as it is, as the learning rate was 0 when it was sent."""
        return self._sent_lr.get(id(group)) == 0

    def _step_inner(self, changes: dict[str, Any]) -> None:
        """Step the wrapped optimizer with some options changed for the time of the call."""
        saved = [dict(group) for group in self.param_groups]
        try:
            for group in self.param_groups:
                group.update(changes)
                if self._steps_with_one(group):
                    group["lr"] = 1.0
            self.optimizer.step()
        finally:
            for group, old in zip(self.param_groups, saved, strict=True):
                group.update({key: old[key] for key in (*changes, "lr")})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as the wrapped optimizer does.

        Raises:
            GradientError: if their exchange is under way: call `step` or `synchronize` first.
        """
        if self.reducer.pending:
            raise GradientError(
                "zero_grad() between backward() and step(): the exchange is under way. "
                "Call step(), or synchronize() to drop this step's gradient"
            )
        self._synchronized = False
        self.optimizer.zero_grad(set_to_none=set_to_none)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add to `.grad` and exchange nothing, as in DDP."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def stats(self) -> dict[str, float | int | str]:
        """What the exchange has cost: see `dgc.train.stats.Stats`."""
        return self.reducer.stats.as_dict()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: plain tensors, numbers and strings, by parameter name.

        Residuals differ among ranks: every rank saves its own and loads its own.
        """
        return {
            "version": STATE_VERSION,
            "rank": self.comm.rank,
            "world_size": self.comm.world_size,
            "optimizer": self.optimizer.state_dict(),
            "local_momentum": {name: b.clone() for name, b in self.local.buffers.items()},
            "with_momentum": sorted(self._with_momentum),
            **self.reducer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave on the same rank.

        Raises:
            StateError: another format version, rank, world size, or model; the difference is named
                and nothing is changed.
        """
        wanted = {
            "version": STATE_VERSION,
            "rank": self.comm.rank,
            "world_size": self.comm.world_size,
        }
        for key, value in wanted.items():
            if state_dict.get(key) != value:
                raise StateError(f"this state has {key} {state_dict.get(key)}, here it is {value}")
        unknown = sorted(state_dict["local_momentum"].keys() - self.params.keys())
        if unknown:
            raise StateError(f"this state has momentum for {unknown[0]}, which is not trained here")
        self.reducer.load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._group = {p: g for g in self.param_groups for p in g["params"]}
        buffers = state_dict["local_momentum"]
        self.local.buffers = {n: b.clone().to(self.params[n]) for n, b in buffers.items()}
        self._with_momentum = set(state_dict["with_momentum"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ConfigError("add_param_group() is not supported: wrap the optimizer again")

    # What torch's schedulers, scalers and hooks look at is the wrapped optimizer's own.

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not constructed yet
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self.optimizer!r}, {self.config!r})"


def _check_supported(optimizer: Optimizer, owns_momentum: bool) -> None:
    if isinstance(optimizer, DistributedOptimizer):
        raise ConfigError(
            "the optimizer is a DistributedOptimizer already: momentum would be "
            "applied twice. Wrap the plain optimizer"
        )
    if not owns_momentum:
        return
    if not isinstance(optimizer, SGD):
        raise ConfigError(
            f"momentum correction needs torch.optim.SGD, this is {type(optimizer).__name__}: pass "
            "compression=dgc.DGC(momentum_correction=False) to leave momentum to the optimizer"
        )
    if type(optimizer).step is not SGD.step:
        raise ConfigError(
            f"{type(optimizer).__name__} overrides SGD.step and may apply momentum a second time: "
            "use torch.optim.SGD, or dgc.DGC(momentum_correction=False)"
        )
    if any("momentum_buffer" in each for each in optimizer.state.values()):
        raise ConfigError(
            "the optimizer has momentum of earlier steps, which would be applied beside the "
            "memory's: wrap it before its first step, or load the state through the wrapper"
        )
