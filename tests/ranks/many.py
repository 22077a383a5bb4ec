"""Train with every pattern on as many ranks as asked: MANY RANKS; all must end with equal parameters."""

import os
import sys

import torch

import dgc
from dgc.config import PATTERNS
from tests.forking import exit_codes, fork_ranks, warm_up
from tests.workers import Toy, flat, train, wrap

STEPS = 3


def body(rank: int) -> None:
    rt = dgc.init("gloo", timeout_seconds=60)
    for pattern in PATTERNS[:-1]:  # the last chooses among them
        model = Toy(seed=rank)
        config = dgc.DGC(density=0.1, min_selected=2, pattern=pattern)
        train(model, wrap(model, config, rt.comm), range(STEPS))
        mine = flat(model)
        assert bool(mine.isfinite().all())
        assert not torch.equal(mine, flat(Toy()))
        everybody = rt.comm.all_gather(mine.view(torch.uint8)).wait()
        assert bool((everybody == everybody[0]).all()), pattern
    rt.comm.barrier()


warm_up()
codes = exit_codes(fork_ranks(int(sys.argv[1]), body))
assert not any(codes), codes
print(f"{len(codes)} ranks agree", flush=True)
os._exit(0)
