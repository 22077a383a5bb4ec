"""Deep Gradient Compression: distributed training that sends a thousandth of the gradient."""

from dgc import core, model, train
from dgc.comm.runtime import Runtime, init
from dgc.config import DGC, Dense
from dgc.errors import DGCError
from dgc.model import export, load, prune, save, sensitivity, share
from dgc.train.hook import register
from dgc.train.optimizer import DistributedOptimizer

__all__ = [
    "DGC",
    "DGCError",
    "Dense",
    "DistributedOptimizer",
    "Runtime",
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
