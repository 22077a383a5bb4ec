"""One line in training loops that own DDP themselves: Accelerate, Hugging Face Trainer, Lightning.

Importing this package imports none of them. Each module registers the hook once the framework has
wrapped the model, and keeps the memory in the framework's own checkpoints.
"""

import math
import sys
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer

from dgc.config import DGC, Compression
from dgc.errors import ConfigError, MissingPackageError
from dgc.train.hook import HookState
from dgc.train.hook import register as register_ddp


def need(names: tuple[str, ...], package: str) -> Any:
    """The first of the modules `names` that is there; one that is loaded already goes first.

    Args:
        names: full names of modules that offer the same.
        package: what pip installs.

    Raises:
        MissingPackageError: none can be imported.

    Example:
        >>> need(("json",), "json").__name__
        'json'
        >>> need(("no_such_framework",), "no-such-framework")
        Traceback (most recent call last):
        ...
        dgc.errors.MissingPackageError: no_such_framework is not installed: pip install no-such-framework
    """
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != name.split(".")[0]:
                raise  # it is there, and broken: say why
    raise MissingPackageError(f"{' or '.join(names)} is not installed: pip install {package}")


def register_prepared(
    model: nn.Module,
    optimizer: Optimizer,
    compression: Compression | None,
    scaler: GradScaler | None,
    **limits: float | None,
) -> HookState:
    """`dgc.register` for a model and an optimizer as a framework has wrapped them.

    Args:
        model: DDP, or `torch.compile` of it.
        optimizer: as the framework wraps it, or plain.
        compression: `DGC()` by default.
        scaler: the framework's, if it has one.
        limits: the framework's option that limits the norm of what arrives, with its value.

    Raises:
        ConfigError: the framework did not choose DDP, or clips what is no gradient; and what
            `dgc.register` raises.
    """
    wrapped = getattr(model, "_orig_mod", model)
    if not isinstance(wrapped, DistributedDataParallel):
        raise ConfigError(
            f"the framework trains a {type(wrapped).__name__}, not a DistributedDataParallel: start "
            "two processes at least (torchrun --nproc-per-node 2 …), without DeepSpeed and FSDP"
        )
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate and Lightning wrap it
    config = DGC() if compression is None else compression
    for option, limit in limits.items():
        if clips(inner, config, limit):
            raise ConfigError(
                f"{option}={limit} clips what arrives: of few elements what each gathered in many steps, "
                f"whose norm is many times a gradient's, and what is cut is lost. Set {option}=0 and, to "
                f"clip gradients before that, dgc.DGC(clip_norm={limit})"
            )
    return register_ddp(model, inner, compression, scaler=scaler)


def clips(optimizer: Optimizer, config: Compression, limit: float | None) -> bool:
    """Whether a limit on the norm of what arrives would take from it.

    Not where all of it is Adam's steps, which are too small for that; see `dgc.train.adam`.

    Example:
        >>> clips(torch.optim.SGD([torch.ones(1)], lr=0.1), DGC(), 1.0)
        True
    """
    if not isinstance(config, DGC) or not 0 < (limit or 0.0) < math.inf:
        return False
    steps = isinstance(optimizer, Adam) and config.momentum_correction and not config.exclude
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return not steps or any(param.dtype is torch.float16 for param in params)
