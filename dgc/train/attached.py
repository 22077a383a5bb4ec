"""Hooks around the step of an optimizer that stays the user's: what `register` and FSDP2 share."""

from typing import Any

import torch
from torch.optim import Optimizer

from dgc.comm.base import Communicator
from dgc.errors import ConfigError, GradientError, StateError
from dgc.train.inner import InnerStep, RefuseScaler
from dgc.train.momentum import local
from dgc.train.reducer import Reducer
from dgc.train.state import BEFORE_STEP, KEYS, check_header, header


class Attached:
    """The memory of one model, by parameter name, beside the user's own optimizer.

    Hooks before and after its `step` keep it from applying momentum a second time, and from stepping
    at all where a rank had a non-finite gradient. Who inherits says when gradients are exchanged.
    """

    comm: Communicator
    inner: InnerStep
    reducer: Reducer
    _apply = True
    _fresh = False  # a mean lies in .grad that no step has used
    _ours = True  # and this rank's own backward pass has a part in it

    def attach(self) -> None:
        """From here on the optimizer's steps are prepared here."""
        optimizer = self.inner.optimizer
        hooks = optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Attached) for hook in hooks):
            raise ConfigError(
                "the optimizer is registered with dgc already and momentum would be applied twice: "
                "make a new optimizer for the new model"
            )
        if self.inner.scaler is None:
            optimizer._step_supports_amp_scaling = RefuseScaler()  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        # A step that was interrupted has left the options of its group without momentum.
        optimizer.register_state_dict_pre_hook(lambda _: self.inner.restore_options())

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # torch passes the optimizer itself as the first of `args`.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._prepare()
            return None

        def closed() -> Any:  # the gradients are there once the user's closure has run
            with torch.enable_grad():
                loss = closure()
            self._prepare()
            return loss

        others = {key: value for key, value in kwargs.items() if key != "closure"}
        return (optimizer, closed), others

    def _prepare(self) -> None:
        params = self.inner.params.values()
        grads = [param.grad for param in params if param.grad is not None]
        if not self._fresh and grads:
            still = all(group["lr"] == 0 for group in self.inner.optimizer.param_groups)
            if still and not any(bool(local(grad).any()) for grad in grads):
                self.inner.put_options()
                return  # torch.distributed.checkpoint opens an optimizer's state so
            raise GradientError(
                "step() without a synchronised backward pass since the last step: leave no_sync() "
                "before the last backward pass of a step"
            )
        if not grads:
            self._refuse_dropped()
        if self._fresh and not self._apply:
            for param in params:
                param.grad = None  # nothing to step with: all ranks skip
        self._fresh = False
        self.inner.before(self.reducer.masked, self.reducer.idle)

    @property
    def _dropped(self) -> bool:
        """Whether a mean would be lost if no step were made with it."""
        return self._fresh and self._apply and self._ours

    def _refuse_dropped(self) -> None:
        """Call before a mean is delivered: the one before must have been stepped with."""
        if self._dropped:
            raise GradientError(
                "no step() was made with the mean of the last synchronised backward pass, and dropping "
                "it does not take its gradient out of the memory: run a backward pass whose gradient "
                "shall not count here, as of a GAN's generator in its discriminator, without "
                "synchronisation (no_sync() of DDP, forward pass included)"
            )

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.inner.after()

    def stats(self) -> dict[str, float | int | str]:
        """What the exchange has cost: see `dgc.train.stats.Stats`."""
        return self.reducer.stats.as_dict()

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory: plain tensors, numbers and strings, by parameter name.

        It goes beside `optimizer.state_dict()`. Every rank saves its own and loads its own.

        Raises:
            StateError: between `backward()` and `step()`.
        """
        if self._dropped:
            raise StateError(BEFORE_STEP)
        return {**header(self.comm), **self.inner.state_dict(), **self.reducer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave on the same rank, here or in `DistributedOptimizer`.

        Raises:
            StateError: another format version, rank, world size, or model; the difference is named
                and nothing is changed.
        """
        check_header(state_dict, self.comm, KEYS)
        self.inner.check_state(state_dict)
        self.reducer.check_state(state_dict)
        self.reducer.load_state_dict(state_dict)
        self.inner.load_state_dict(state_dict)
        self._fresh = False  # the mean of a step that is given up
