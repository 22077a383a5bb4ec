"""Deep Gradient Compression: distributed training that sends a thousandth of the gradient."""

from typing import TYPE_CHECKING, Any

from dgc import core, model, train
from dgc.comm.runtime import Runtime, init
from dgc.config import DGC, Dense
from dgc.errors import DGCError
from dgc.model import export, load, prune, save, sensitivity, share
from dgc.train.hook import register
from dgc.train.optimizer import DistributedOptimizer

if TYPE_CHECKING:
    from dgc.train.fsdp2 import apply_fsdp2

__all__ = [
    "DGC",
    "DGCError",
    "Dense",
    "DistributedOptimizer",
    "Runtime",
    "apply_fsdp2",
    "core",
    "export",
    "init",
    "load",
    "model",
    "prune",
    "register",
    "save",
    "sensitivity",
    "share",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "apply_fsdp2":  # what it needs of torch takes half a second to import
        from dgc.train.fsdp2 import apply_fsdp2

        return apply_fsdp2
    raise AttributeError(f"module 'dgc' has no attribute {name!r}")
