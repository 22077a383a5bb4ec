"""Rank 1 dies, raises, exits, hangs (early: before it wraps), or is killed while it exchanges.

The others must stop soon.
"""

import os
import signal
import sys
import time

from torch import Tensor

import dgc
from dgc.comm.base import Handle
from dgc.errors import CommError
from tests.workers import Toy, train, wrap

HANG_SECONDS = 15.0  # of rank 1; well over the limit of the others

backend, how = sys.argv[1:]
rt = dgc.init(backend, timeout_seconds=3)

if how == "hangs early" and rt.rank == 1:
    time.sleep(HANG_SECONDS)
    os._exit(17)
started = time.monotonic()


def stop(error: CommError) -> None:
    soon = time.monotonic() - started < HANG_SECONDS
    print(f"rank {rt.rank} stopped {'in time' if soon else 'too late'}: {error}", flush=True)
    os._exit(3)


model = Toy()
try:
    optimizer = wrap(model, dgc.DGC(), None)
except CommError as error:
    stop(error)
train(model, optimizer, range(3))
if rt.rank == 1:
    if how == "dies":
        os._exit(17)
    if how == "raises":
        raise ValueError("a fault of the script")
    if how == "exits":
        with rt:
            sys.exit(17)
    if how == "hangs":
        time.sleep(HANG_SECONDS)
        os._exit(17)
    started_gather = optimizer.comm.all_gather

    def all_gather(message: Tensor) -> Handle:
        started_gather(message)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it is dead")

    optimizer.comm.all_gather = all_gather  # type: ignore[method-assign]
started = time.monotonic()
try:
    train(model, optimizer, range(3, 100))
except CommError as error:
    stop(error)
