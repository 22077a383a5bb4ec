"""`DistributedOptimizer`: an optimizer whose step uses the mean gradient of all ranks."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from dgc.comm.base import Communicator, Twins
from dgc.comm.runtime import default_communicator
from dgc.config import DGC, Compression
from dgc.errors import ConfigError, GradientError, StateError
from dgc.train.agree import check_agreement, named_parameters_of
from dgc.train.guard import Guard
from dgc.train.inner import InnerStep, RefuseScaler, check_supported
from dgc.train.reducer import Reducer
from dgc.train.state import BEFORE_STEP, KEYS, check_header, header

# Which wrapper exchanges the gradient of a parameter, as a weak reference.
_wrappers: Any = WeakIdKeyDictionary()
_twins = Twins()


_ANEW = (
    "an earlier DistributedOptimizer has made steps with these parameters: what it has not sent yet is "
    "dropped, and the warm-up begins again, unless its state is loaded into one of the same layers. To "
    "train layers later without that, wrap while all require gradients, and then freeze these"
)


def _notify(wrapper: "weakref.ref[DistributedOptimizer]", name: str) -> Callable[[Tensor], None]:
    def notify(_: Tensor) -> None:
        live = wrapper()
        if live is not None:
            live._gradient_ready(name)

    return notify


def _remove(handles: Iterable[RemovableHandle], reducer: Reducer) -> None:
    for handle in handles:
        handle.remove()
    if not reducer.pending:
        _twins.give_back(reducer.comm)


class DistributedOptimizer(Optimizer):
    """Wraps an optimizer: gradients are exchanged during backward, `step` applies their mean.

    Parameters, frozen ones too (and buffers, where given), are overwritten with those of rank 0 at
    construction. What is frozen after that may train again, and costs until then what it did. To train
    others, wrap again: parameters belong to the wrapper that was made last, whose memory and warm-up
    begin anew.
    With momentum correction the options of the wrapped optimizer (SGD's momentum with Nesterov,
    dampening and weight decay; Adam's second moment) are read from its param groups at each step, so
    schedulers keep working, and applied once: here. With Adam what arrives in `.grad` is a small
    multiple of a step, and clipping it changes nothing; see `dgc.train.adam`.

    Args:
        optimizer: torch.optim.SGD, Adam or AdamW; any with `DGC(momentum_correction=False)` or
            `Dense`.
        named_parameters: `model.named_parameters()`, which must name all that `optimizer` trains.
        compression: `dgc.DGC(...)` or `dgc.Dense(...)`.
        comm: the ranks; None is the communicator of the last `dgc.init()`.
        named_buffers: `model.named_buffers()` to broadcast these too.
        scaler: the `torch.amp.GradScaler` of the training loop, if it has one: gradients are
            unscaled before they enter the memory, and an inf on one rank makes every rank's scaler
            skip the step and back off once. The exchange then ends with the backward pass.

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
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        # Optimizer.__init__ is not called: param_groups and state are those of the wrapped one.
        config = DGC() if compression is None else compression
        self.optimizer, self.config, self.scaler = optimizer, config, scaler
        if isinstance(optimizer, DistributedOptimizer):
            raise ConfigError(
                "the optimizer is a DistributedOptimizer already: momentum would be "
                "applied twice. Wrap the plain optimizer"
            )
        check_supported(optimizer, config, scaler)
        named = list(named_parameters)
        self.params = named_parameters_of(optimizer, named)
        earlier = [_wrappers.get(param, lambda: None)() for param in self.params.values()]
        if any(each is not None and each.reducer.pending for each in earlier):
            raise ConfigError("wrap between steps: gradients of an earlier wrapper are under way")
        # Ranks that use different parameters exchange in different order, so it shares with nobody.
        device = next(iter(self.params.values())).device
        self.comm = _twins.lend(comm or default_communicator(device))
        if all(name.startswith("module.") for name in self.params):
            warnings.warn(
                "all parameters are named module.…, as DistributedDataParallel names them, which "
                "exchanges gradients itself: use dgc.register(ddp_model, optimizer), or leave DDP out",
                stacklevel=2,
            )
        trained = set(self.params.values())
        every = self.params | {name: param for name, param in named if param not in trained}
        buffers = [buffer for _, buffer in named_buffers]
        numbered = {f"buffer {i}": buffer for i, buffer in enumerate(buffers)}
        check_agreement(every | numbered, config.describe(), self.comm)
        self.inner = InnerStep(optimizer, self.params, config, self.comm.world_size, scaler)
        self.reducer = self.inner.reducer(self.params, self.comm)
        self._syncing, self._synchronized, self._apply = True, False, True
        for tensor in [*every.values(), *buffers]:
            if tensor.layout == torch.strided:
                self.comm.broadcast_(tensor.detach())
        self._take_over()

    def _take_over(self) -> None:
        """Hook the parameters; an earlier wrapper of one of them exchanges no more."""
        for param in self.params.values():
            earlier = _wrappers.get(param, lambda: None)()
            if earlier is not None:
                if (
                    earlier._release.alive
                    and earlier.reducer.step
                    and isinstance(earlier.config, DGC)
                ):
                    warnings.warn(_ANEW, stacklevel=3)
                earlier._release()
            _wrappers[param] = weakref.ref(self)
        self.guard = Guard(self.params)
        hooks = [
            param.register_post_accumulate_grad_hook(_notify(weakref.ref(self), name))
            for name, param in self.params.items()
        ]
        self._release = weakref.finalize(self, _remove, [*self.guard.handles, *hooks], self.reducer)
        self._release.atexit = False

    def _gradient_ready(self, name: str) -> None:
        """The gradient of `name` has been added to `.grad`."""
        if self._synchronized and self._apply:
            raise GradientError(
                "a backward pass between synchronize() and step(): its gradients would be "
                "added to the mean. Call step() and zero_grad() first; with a scaler checkpoint "
                "activations without reentry (use_reentrant=False)"
            )
        if not self._syncing:
            return
        self._synchronized = False  # by a scaler's leave: it skipped the step
        if self.scaler is not None and not self.reducer.pending:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.synchronize)
        self.reducer.ready(name)

    def synchronize(self) -> None:
        """Wait for the exchange; afterwards `.grad` holds the mean, to clip or look at.

        A parameter that no rank used keeps `.grad` None. Called by `step` where it was not before.

        Raises:
            CommError: another rank died or did not answer in time.
            ConfigError: a later wrapper has the parameters.
            GradientError: too many steps in a row with non-finite gradients, a gradient that was
                changed while it was exchanged, or one added to the mean of the step before.
            WireError: a message was damaged on its way.
        """
        if not self._release.alive:
            raise ConfigError("a DistributedOptimizer made later has the parameters: step that one")
        if not self._synchronized:
            self.guard.check()
            try:
                self._apply = self.reducer.finish()
            finally:
                self.inner.exchanged()
            self.guard.delivered()
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
        if not self._synchronized and self.scaler is not None and self.scaler.is_enabled():
            raise GradientError(
                "scaler.step() without an exchange: its gradients are unscaled already, and would be "
                "unscaled again. Leave no_sync() before the last backward pass of a step, or call "
                "synchronize() before scaler.step()"
            )
        self.synchronize()
        self._synchronized = False
        if not self._apply:
            return
        grads = (param.grad for param in self.params.values())
        if len(self.reducer.idle) < len(self.params) and all(grad is None for grad in grads):
            raise GradientError(
                "the mean was dropped between synchronize() and step(), as by model.zero_grad(), and its "
                "gradient is in the memory no more: call step() first"
            )
        self.inner.before(self.reducer.masked, self.reducer.idle)
        try:
            self.optimizer.step()
        finally:
            self.inner.after()
            self.guard.stepped()

    @property
    def _step_supports_amp_scaling(self) -> bool | RefuseScaler:
        return False if self.scaler is not None else RefuseScaler()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as the wrapped optimizer does.

        Raises:
            GradientError: no `step` was made with them, and they are in the memory already.
        """
        if self.reducer.pending or (self._synchronized and self._apply):
            raise GradientError(
                "zero_grad() between backward() and step(): the gradient is in the memory or under "
                "way, which this does not undo. Call step(); run a backward pass whose gradient shall "
                "not count inside no_sync()"
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

        Raises:
            StateError: between `backward()` and `step()`.
        """
        if self._synchronized and self._apply:
            raise StateError(BEFORE_STEP)
        return {
            **header(self.comm),
            "optimizer": self.optimizer.state_dict(),
            **self.inner.state_dict(),
            **self.reducer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave on the same rank.

        Raises:
            StateError: another format version, rank, world size, or model; the difference is named
                and nothing is changed. Or gradients are under way: `synchronize()` first.
        """
        check_header(state_dict, self.comm, (*KEYS, "optimizer"))
        self.inner.check_state(state_dict)
        self.reducer.check_state(state_dict)
        try:
            self.optimizer.load_state_dict(state_dict["optimizer"])
        except (ValueError, KeyError) as error:
            raise StateError(f"the state of the wrapped optimizer does not fit: {error}") from error
        self.reducer.load_state_dict(state_dict)
        self.inner.load_state_dict(state_dict)
        self._synchronized = False  # the mean of a step that is given up

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ConfigError(
            "add_param_group() is not supported: add to the plain optimizer and wrap that again"
        )

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError("a DistributedOptimizer is not pickled or copied: use state_dict()")

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
