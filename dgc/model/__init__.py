"""The final model: prune, share, encode, one small file."""

from dgc.model.constrain import release, weights_of
from dgc.model.distill import distill
from dgc.model.file import export, inspect, load, plain_state, read_state, save, save_state
from dgc.model.fold import fold
from dgc.model.prune import (
    cubic_density,
    densities,
    import_masks,
    l1_penalty,
    l2_penalty,
    prune,
    prune_by_std,
    prune_iteratively,
)
from dgc.model.report import Report, Row
from dgc.model.sensitivity import Sensitivity, sensitivity
from dgc.model.share import share

__all__ = [
    "Report",
    "Row",
    "Sensitivity",
    "cubic_density",
    "densities",
    "distill",
    "export",
    "fold",
    "import_masks",
    "inspect",
    "l1_penalty",
    "l2_penalty",
    "load",
    "plain_state",
    "prune",
    "prune_by_std",
    "prune_iteratively",
    "read_state",
    "release",
    "save",
    "save_state",
    "sensitivity",
    "share",
    "weights_of",
]
