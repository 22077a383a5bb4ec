"""Deep Gradient Compression: distributed training that sends a thousandth of the gradient."""

from dgc import core, train
from dgc.comm.runtime import Runtime, init
from dgc.config import DGC, Dense
from dgc.errors import DGCError
from dgc.train.hook import register
from dgc.train.optimizer import DistributedOptimizer

__all__ = [
    "DGC",
    "DGCError",
    "Dense",
    "DistributedOptimizer",
    "Runtime",
    "core",
    "init",
    "register",
    "train",
]
