"""Patterns: how the payloads of all ranks reach all ranks."""

from typing import Protocol

from torch import Tensor

from dgc.comm.base import Communicator, Handle


class Pattern(Protocol):
    """One way to exchange a payload; `wait` on what `start` returns gives the gathered tensor."""

    name: str

    def start(self, comm: Communicator, payload: Tensor) -> Handle: ...

    def received_bytes(self, world_size: int, payload_bytes: int) -> int:
        """Bytes that reach each rank."""
        ...


class CodedAllGather:
    """Every rank gets every message, `[P, n]`: (P−1)·n bytes; exact, best for few ranks."""

    name = "coded all-gather"

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        return comm.all_gather(payload)

    def received_bytes(self, world_size: int, payload_bytes: int) -> int:
        return (world_size - 1) * payload_bytes


class DenseAllReduce:
    """Every rank gets the sum: 2·n·(P−1)/P bytes in a ring."""

    name = "dense all-reduce"

    def start(self, comm: Communicator, payload: Tensor) -> Handle:
        return comm.all_reduce(payload)

    def received_bytes(self, world_size: int, payload_bytes: int) -> int:
        return 2 * payload_bytes * (world_size - 1) // world_size
