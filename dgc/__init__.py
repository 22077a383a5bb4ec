"""Deep Gradient Compression: distributed training that sends a thousandth of the gradient."""

from dgc import core
from dgc.errors import DGCError

__all__ = ["DGCError", "core"]
