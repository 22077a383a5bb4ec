"""Work on a GPU that is recorded once and then started in one call: a CUDA graph."""

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

import torch

from dgc.core.tables import keeping

T = TypeVar("T")
_ONE_AT_A_TIME = threading.Lock()
"""The stream is shared, and torch waits for the whole device before."""


class Graph(Generic[T]):
    """What `work` launches, to be run again without its Python.

    Nothing that `work` refers to is freed before this is.

    Args:
        work: reads and writes tensors that stay where they are (of a `Table`, they do), and neither
            waits for the device nor uploads. It must have run before, so that its kernels are compiled. It is recorded, not
            run. Other threads may go on using the device.
        device: where it launches.

    Attributes:
        result: what `work` returned: tensors that `replay` overwrites.

    Example:
        >>> if torch.cuda.is_available():
        ...     x = torch.zeros(1, device="cuda")
        ...     graph = Graph(lambda: x + 1, x.device)
        ...     assert graph.replay().item() == 1
        ...     assert x.fill_(2).item() == 2 and graph.replay().item() == 3
    """

    def __init__(self, work: Callable[[], T], device: torch.device) -> None:
        self._graph, self._work = torch.cuda.CUDAGraph(), work
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):
            # The outer stream is current again even if the recording fails to end.
            recording = torch.cuda.graph(
                self._graph, stream=_stream(device), capture_error_mode="thread_local"
            )
            with keeping() as self._tables, _ONE_AT_A_TIME, recording:
                self.result = work()

    def replay(self) -> T:
        """Start the work; the host does not wait for it."""
        self._graph.replay()
        return self.result


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where work of `device` is recorded. Torch's own default is on the first device that records."""
    return torch.cuda.Stream(device)


def recording() -> bool:
    """Whether the caller's work is being recorded already, by whoever."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
