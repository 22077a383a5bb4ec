"""What must be set before any test module is imported, and a fixture of several."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported: without a GPU its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test does is done as on a GPU."""
    from dgc.train.step import message_plan
    from tests.core.on_device import use_device_path

    message_plan.cache_clear()  # sizes depend on the device
    use_device_path(monkeypatch)
    yield
    message_plan.cache_clear()
