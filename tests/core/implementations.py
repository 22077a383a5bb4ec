"""What the kernels of a device are tested as."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dgc.core.layout import Layout


class Implementation(NamedTuple):
    """A kernel module and the device it works on; Triton's interpreter works on the CPU."""

    module: ModuleType
    device: str

    def to(self, tensor: Tensor) -> Tensor:
        return tensor.clone().to(self.device)

    def layout(self, numels: Sequence[int]) -> Layout:
        return Layout.of(numels, self.device)


def triton_kernels() -> Implementation:
    pytest.importorskip("triton")
    from dgc.core.kernels import cuda

    return Implementation(cuda, "cuda" if torch.cuda.is_available() else "cpu")
