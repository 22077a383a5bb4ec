"""`register`: gradient compression as a communication hook of DistributedDataParallel.

DDP's buckets change between steps; here they only bring gradients. What is sent together, and the
memory, follow `Reducer`'s own plan by parameter name, as with `DistributedOptimizer`.
"""

from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dgc.comm.torch_dist import TorchCommunicator
from dgc.config import DGC, Compression
from dgc.errors import ConfigError, GradientError
from dgc.train.agree import check_agreement, named_parameters_of
from dgc.train.attached import Attached
from dgc.train.guard import Guard
from dgc.train.inner import InnerStep, check_supported
from dgc.train.optimizer import DistributedOptimizer

Future = torch.futures.Future[Tensor]


class HookState(Attached):
    """What `register` returns: the memory of one DDP model, by parameter name."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        config: Compression,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        params = named_parameters_of(optimizer, _inner_module(model).named_parameters())
        device = next(iter(params.values())).device
        self.comm = TorchCommunicator(model.process_group, device=device)
        _check_all_trained(model, set(params.values()))
        check_agreement(params, config.describe(), self.comm)
        self.model = ref(model)
        self.names = {param: name for name, param in params.items()}
        self.inner = InnerStep(optimizer, params, config, self.comm.world_size, scaler)
        self.reducer = self.inner.reducer(params, self.comm)
        self.guard = Guard(params)
        self._waiting: list[tuple[Future, Tensor]] = []

    def exchange(self, bucket: dist.GradBucket) -> Future:  # type: ignore[name-defined]
        """Start the exchange of a bucket's gradients; with the last bucket, finish all."""
        buffer, used = bucket.buffer(), self.guard.used
        if buffer.layout != torch.strided:
            raise GradientError(
                f"a gradient of shape {tuple(buffer.shape)} is {buffer.layout}: use dense gradients "
                "(for an embedding, sparse=False)"
            )
        if not getattr(self.model(), "_divide_by_initial_world_size", True):
            raise ConfigError(
                "join(divide_by_initial_world_size=False): the mean is over all ranks, joined ones too; "
                "leave it at True"
            )
        future: Future = torch.futures.Future(
            devices=[buffer.device] if buffer.device.type == "cuda" else []
        )
        self._waiting.append((future, buffer))
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if param not in self.names:
                raise self._parted("exchanges", param, "was not trained")
            name = self.names[param]
            self.reducer.ready(name, grad, used=name in used)
        if bucket.is_last():
            self._finish()
        return future

    def _parted(self, does: str, param: Tensor, was: str) -> ConfigError:
        return ConfigError(
            f"DDP {does} the gradient of a parameter of shape {tuple(param.shape)}, which {was} when "
            "dgc.register was called: freeze or unfreeze first, then make DistributedDataParallel "
            "and register, in this order"
        )

    def _finish(self) -> None:
        if missing := self.reducer.missing:
            raise self._parted("does not exchange", self.inner.params[missing[0]], "was trained")
        waiting, self._waiting = self._waiting, []
        self.guard.check()
        ours = bool(self.guard.used)  # a rank that has joined takes part without a step of its own
        if ours:
            self._refuse_dropped()
        try:
            self._apply, self._ours = self.reducer.finish(), ours
        finally:
            self.inner.exchanged()
        self.guard.delivered()
        self._fresh = True
        for future, buffer in waiting:
            future.set_result(buffer)


def register(
    ddp_model: nn.Module,
    optimizer: Optimizer,
    compression: Compression | None = None,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> HookState:
    """Exchange the gradients of a DDP model compressed.

    Call it once, before the first backward pass. The training loop stays as it is: `optimizer`
    steps with the mean gradient, momentum applied in the memory before the exchange.

    Args:
        ddp_model: `torch.nn.parallel.DistributedDataParallel`, or `torch.compile` of one.
        optimizer: torch.optim.SGD, Adam or AdamW over all its parameters; any optimizer
            with `DGC(momentum_correction=False)` or `Dense`.
        compression: `dgc.DGC(...)` or `dgc.Dense(...)`; `DGC()` by default.
        scaler: the `torch.amp.GradScaler` of the training loop, if it has one: gradients are
            unscaled before they enter the memory.

    Returns:
        The state, with `state_dict()`, `load_state_dict()` and `stats()`.

    Raises:
        ConfigError: not a DDP model, one whose hook slot is taken, an optimizer that would apply
            momentum twice or lacks parameters, or ranks that differ.

    Example:
        >>> dgc_state = register(torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)], lr=0.1))
        Traceback (most recent call last):
        ...
        dgc.errors.ConfigError: the model is a Linear: wrap it in DistributedDataParallel first

    Source: Lin et al., Deep Gradient Compression, ICLR 2018, arXiv 1712.01887.
    """
    config = DGC() if compression is None else compression
    model = getattr(ddp_model, "_orig_mod", ddp_model)
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"the model is a {type(model).__name__}: wrap it in DistributedDataParallel first"
        )
    if isinstance(optimizer, DistributedOptimizer):
        raise ConfigError(
            "the optimizer is a DistributedOptimizer, which exchanges gradients and applies "
            "momentum itself: give register the plain optimizer, or leave DDP out"
        )
    if getattr(model, "_use_python_reducer", False):
        raise ConfigError(
            'torch._dynamo.config.optimize_ddp is "python_reducer", which bypasses hooks: leave it '
            "at its default"
        )
    check_supported(optimizer, config, scaler)
    state = HookState(model, optimizer, config, scaler)
    _claim_slot(model, state)
    state.attach()
    return state


class _Slot:
    """What DDP keeps. A model that is copied or pickled has none: it exchanges nothing here."""

    def __init__(self, state: HookState) -> None:
        self.state = state

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _hook(slot: _Slot, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    return slot.state.exchange(bucket)


def _claim_slot(model: DistributedDataParallel, state: HookState) -> None:
    try:
        model.register_comm_hook(_Slot(state), _hook)
    except RuntimeError as error:
        model._comm_hooks.pop()  # DDP lists a hook before it finds the slot taken
        taken = [getattr(hook, "__qualname__", repr(hook)) for hook, _ in model._comm_hooks]
        raise ConfigError(
            f"DDP has a communication hook already ({', '.join(taken) or 'a built-in one'}), and "
            "takes only one: leave out that register_comm_hook, or the mixed_precision option"
        ) from error


def _inner_module(model: DistributedDataParallel) -> nn.Module:
    """The user's module: names do not depend on whether it was compiled."""
    module: nn.Module = getattr(model.module, "_orig_mod", model.module)
    return module


def _check_all_trained(model: DistributedDataParallel, trained: set[nn.Parameter]) -> None:
    ignored = set(model.parameters_to_ignore)
    for name, param in model.module.named_parameters():
        if param in trained and name in ignored:
            raise ConfigError(
                f"DDP ignores {name}, which the optimizer trains, so that ranks would part: take it from "
                "one of the two"
            )
        if param.requires_grad and param not in trained and name not in ignored:
            raise ConfigError(
                f"DDP exchanges the gradient of {name}, which the optimizer does not train: give "
                "it to the optimizer, or requires_grad_(False) before DistributedDataParallel"
            )
