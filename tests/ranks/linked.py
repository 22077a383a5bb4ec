"""Train over a link that is cut: LINKED FOLDER TIMEOUT; rank 0 waits at step 20 for FOLDER/cut."""

import hashlib
import os
import sys
import time
from pathlib import Path

import dgc
from dgc.errors import CommError
from tests.workers import Toy, flat, train, wrap

folder, timeout = Path(sys.argv[1]), float(sys.argv[2])
rt = dgc.init("gloo", timeout_seconds=timeout)
model = Toy()
optimizer = wrap(model, dgc.DGC(density=0.1, min_selected=1), None)
try:
    train(model, optimizer, range(20))
    if rt.rank == 0:
        (folder / "ready").touch()
        while not (folder / "cut").exists():
            time.sleep(0.01)
    train(model, optimizer, range(20, 60))
except CommError as error:
    os.write(1, f"rank {rt.rank} stopped: {str(error)[:60]}\n".encode())
    os._exit(3)
digest = hashlib.sha256(flat(model).numpy().tobytes()).hexdigest()
os.write(1, f"rank {rt.rank} ended with {digest}\n".encode())
rt.comm.barrier()
os._exit(0)
