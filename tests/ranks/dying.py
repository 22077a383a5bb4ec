"""Rank 1 dies or hangs before step 3; the others must stop with a `CommError`."""

import os
import sys
import time

import dgc
from dgc.errors import CommError
from tests.workers import Toy, train, wrap

backend, how = sys.argv[1:]
rt = dgc.init(backend, timeout_seconds=3)
model = Toy()
optimizer = wrap(model, dgc.DGC(), None)
train(model, optimizer, range(3))
if rt.rank == 1:
    if how == "dies":
        os._exit(17)
    time.sleep(15)
    os._exit(17)
started = time.monotonic()
try:
    train(model, optimizer, range(3, 100))
except CommError as error:
    print(f"rank {rt.rank} stopped after {time.monotonic() - started:.0f} s: {error}", flush=True)
    os._exit(3)
