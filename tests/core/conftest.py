"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest
import torch

from dgc.core.kernels import cpu
from tests.core.implementations import Implementation, triton_kernels


@pytest.fixture(params=["cpu, 1 thread", "cpu, 2 threads", "cpu, 5 threads", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    if request.param == "triton":
        yield triton_kernels()
        return
    before = torch.get_num_threads()
    torch.set_num_threads(int(request.param.split()[1]))
    yield Implementation(cpu, "cpu")
    torch.set_num_threads(before)
