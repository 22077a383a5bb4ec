"""Which parameters travel together."""

import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch.nn import Parameter

from dgc.config import DGC, Compression


def is_excluded(name: str, config: Compression) -> bool:
    """Whether a parameter is exchanged dense by `DGC.exclude`."""
    return isinstance(config, DGC) and any(fnmatchcase(name, each) for each in config.exclude)


def plan(params: Mapping[str, Parameter], config: Compression) -> list[tuple[str, ...]]:
    """The buckets, by name: in reverse order, as backward finishes the last ones first.

    A bucket holds parameters of one device, all compressed or all excluded, and is closed once it
    has `config.bucket_bytes` of fp32 gradient.
    """
    for pattern in config.exclude if isinstance(config, DGC) else ():
        if not any(fnmatchcase(name, pattern) for name in params):
            warnings.warn(f"exclude has {pattern!r}, which no parameter is named by", stacklevel=4)
    closed: list[tuple[str, ...]] = []
    open_: dict[tuple[torch.device, bool], list[str]] = {}
    for name, param in reversed(list(params.items())):
        key = (param.device, is_excluded(name, config))
        names = open_.setdefault(key, [])
        names.append(name)
        if sum(4 * params[each].numel() for each in names) >= config.bucket_bytes:
            closed.append(tuple(open_.pop(key)))
    return closed + [tuple(names) for names in open_.values()]
