"""On each rank: a few steps, then where it stands and a digest of its parameters.

LAUNCHED [BACKEND]. Every figure is a small integer or a power of two, so no rounding can occur.
"""

import hashlib
import os
import sys

import torch

import dgc
from tests.workers import Toy, flat, gradients, train, wrap


def digest(comm: object) -> str:
    model = Toy(integers=True)
    config = dgc.DGC(density=0.1, min_selected=1, value_bits=32)
    optimizer = wrap(model, config, comm, {"lr": 0.5, "momentum": 0.5})
    train(model, optimizer, range(3), lambda step, rank: gradients(step, rank, integers=True))
    return hashlib.sha256(flat(model).numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with dgc.init(*sys.argv[1:]) as rt:
        place = f"rank {rt.rank} of {rt.world_size}, {rt.local_rank} of {rt.local_size} here"
        # One write: ranks share the pipe.
        os.write(1, f"{place}, has {digest(rt.comm)}\n".encode())
