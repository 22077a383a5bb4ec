"""The path of a GPU: on one, or without one in Triton's interpreter, and torch on the CPU."""

import importlib
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dgc.core import kernels
from dgc.core.kernels import graph

LAUNCHED = {
    "cuda_kernels": (
        *("check", "advance", "count_digits", "pick_digit", "count_ties", "collect", "subtract"),
    ),
    "cuda_steps": ("squares_finite", "precondition", "decay"),
    "trim_kernels": (
        *("start", "judge", "key_by_place", "key_by_magnitude", "mark", "take", "remember"),
    ),
    "fit_kernels": ("find_bounds", "fill_histogram", "find_levels", "give_codes"),
    "encode_kernels": (
        *("hold", "move_front", "add_quotients", "judge_room", "hold_what_fits", "split_gaps"),
        *("begin", "pack", "place_ones", "finish"),
    ),
    "decode_kernels": (
        "read_frames",
        "measure",
        "place_ones",
        "finish",
        "clear",
        "add_values",
        "checksum",
    ),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_INTERPRETER = threading.RLock()  # it works on one kernel at a time


class Launched:
    """A kernel whose inside is hidden from what looks at torch's calls."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with _INTERPRETER, torch._C.DisableTorchFunction():
                self.kernel[grid](*args, **kwargs)

        return launch


class Rerun(graph.Graph[Any]):
    """A graph without a GPU: runs its work again; what it returns stays in place, as a graph's does."""

    def __init__(self, work: Callable[[], Any], device: torch.device) -> None:
        self.work, self.result = work, None

    def replay(self) -> Any:
        found = self.work()
        if self.result is None:
            self.result = found
        for place, fresh in zip(tree_leaves(self.result), tree_leaves(found), strict=True):
            if isinstance(place, Tensor):
                place.copy_(fresh)
        return self.result


def use_device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on tensors on `DEVICE` are treated as a GPU's."""
    pytest.importorskip("triton")
    if DEVICE.type == "cuda":
        return
    from dgc.core.kernels import cuda

    for module, names in LAUNCHED.items():
        kernels_of = importlib.import_module(f"dgc.core.kernels.{module}")
        for name in names:
            monkeypatch.setattr(kernels_of, name, Launched(getattr(kernels_of, name)))
    monkeypatch.setattr(kernels, "_for", lambda device: nullcontext(cuda))
    monkeypatch.setattr(kernels, "codes_there", lambda device: True)
    monkeypatch.setattr(graph, "Graph", Rerun)
