"""Work on a GPU that is recorded once and then started in one call: a CUDA graph."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from dgc.core.tables import keeping

T = TypeVar("T")
_ONE_AT_A_TIME = threading.Lock()
"""Torch records on one stream, and waits for the whole device before."""


class Graph(Generic[T]):
    """What `work` launches, to be run again without its Python.

    Args:
        work: reads and writes tensors that stay where they are (of a `Table`, they do), and neither
            waits for the device nor uploads. It must have run before, so that its kernels are compiled. It is recorded, not
            run. Other threads may go on using the device.

    Attributes:
        result: what `work` returned: tensors that `replay` overwrites.

    Example:
        >>> if torch.cuda.is_available():
        ...     x = torch.zeros(1, device="cuda")
        ...     graph = Graph(lambda: x + 1)
        ...     assert graph.replay().item() == 1
        ...     assert x.fill_(2).item() == 2 and graph.replay().item() == 3
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with (
            keeping() as self._tables,
            _ONE_AT_A_TIME,
            torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
        ):
            self.result = work()

    def replay(self) -> T:
        """Start the work; the host does not wait for it."""
        self._graph.replay()
        return self.result


def recording() -> bool:
    """Whether the caller's work is being recorded already, by whoever."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
