"""Hugging Face Accelerate: `register` after `accelerator.prepare`."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dgc.config import Compression
from dgc.errors import ConfigError
from dgc.integrations import need, register_prepared
from dgc.train import checkpoint
from dgc.train.hook import HookState

FOLDER = "dgc"


def register(
    accelerator: Any,
    model: nn.Module,
    optimizer: Optimizer,
    compression: Compression | None = None,
) -> HookState:
    """Exchange the gradients of a prepared model compressed.

    Call it once, after `accelerator.prepare`. `accumulate`, mixed precision, `save_state` and
    `load_state` work as before; the memory of all ranks goes to the folder "dgc" of each saved state.
    In place of `clip_grad_norm_` give `DGC(clip_norm=...)`: what arrives with SGD has many times the
    norm of a gradient, and what is cut from it is lost.

    Args:
        accelerator: the `accelerate.Accelerator`.
        model: what `prepare` returned for the model.
        optimizer: what `prepare` returned for the optimizer.
        compression: `dgc.DGC(...)` or `dgc.Dense(...)`; `DGC()` by default.

    Returns:
        The state, with `state_dict()`, `load_state_dict()` and `stats()`.

    Raises:
        ConfigError: not an Accelerator, or one process only; and what `dgc.register` raises.
        MissingPackageError: Accelerate is not installed.

    Example:
        >>> register(None, nn.Linear(1, 1), None)
        Traceback (most recent call last):
        ...
        dgc.errors.ConfigError: the accelerator is a NoneType: give the accelerate.Accelerator itself
    """
    kind = need(("accelerate",), "accelerate").Accelerator
    if not isinstance(accelerator, kind):
        raise ConfigError(
            f"the accelerator is a {type(accelerator).__name__}: give the accelerate.Accelerator "
            "itself"
        )
    state = register_prepared(model, optimizer, compression, accelerator.scaler)
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: checkpoint.save(state, Path(folder, FOLDER))
    )
    accelerator.register_load_state_pre_hook(
        lambda models, folder: checkpoint.load(state, Path(folder, FOLDER))
    )
    return state
