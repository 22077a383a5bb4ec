"""How long an exchange takes, and where."""

import time
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.comm.base import Communicator
from dgc.core import kernels
from dgc.train.bucket import Bucket, Row
from dgc.train.recorded import Recorder


class Cost(NamedTuple):
    """Of one exchange: the slowest rank's median."""

    elements: int
    payload_bytes: int
    code_seconds: float
    """Selecting, coding and decoding."""
    wait_seconds: float
    """From the start of the collective until its result is there."""
    decode_seconds: float = 0.0
    """Of `code_seconds`, those after the collective."""

    def plus(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(
            self.elements + other.elements,
            self.payload_bytes + other.payload_bytes,
            self.code_seconds + other.code_seconds,
            self.wait_seconds + other.wait_seconds,
            self.decode_seconds + other.decode_seconds,
        )

    @property
    def seconds(self) -> float:
        return self.code_seconds + self.wait_seconds


def measure(bucket: Bucket, comm: Communicator, device: torch.device, repeats: int) -> Cost:
    """Time `repeats` exchanges of gradients drawn anew, after some to warm up."""
    settling = 2 * Recorder.unrecorded + 2 if kernels.codes_there(device) else 2
    numels = bucket.layout.numels
    rows, used = [Row(lr=0.1, applied_lr=0.1)] * len(numels), [True] * len(numels)
    times = []
    for attempt in range(repeats + settling):
        generator = torch.Generator().manual_seed(1000 * attempt + comm.rank)
        grads = [
            torch.randn(numel, generator=generator, dtype=torch.float32).to(device)
            for numel in numels
        ]
        comm.barrier()
        started = _now(device)
        payload = bucket.send(grads, rows, used, attempt)
        sent = _now(device)
        gathered = bucket.pattern.start(comm, payload).wait()
        arrived = _now(device)
        bucket.receive_(gathered, grads, rows)
        bucket.applied_()
        decoding = _now(device) - arrived
        times.append((sent - started + decoding, arrived - sent, decoding))
    medians = [median(column) for column in zip(*times[settling:], strict=True)]
    slowest = largest(torch.tensor(medians), comm)
    return Cost(sum(numels), payload.nbytes, *slowest)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def largest(values: Tensor, comm: Communicator) -> list[float]:
    """Of each of `values` the largest of all ranks: the same on all of them."""
    rows = comm.all_gather(values.to(comm.device)).wait()
    found: list[float] = rows.max(dim=0).values.tolist()
    return found
