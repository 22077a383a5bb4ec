"""A job that is killed over and over: RESUMING FOLDER KILLS SEED; prints a digest of its parameters.

This process starts each life of the job as two forked ranks, kills one or both after a random
number of steps, and starts them again. Ranks save every 5 steps, each its own file.
"""

import hashlib
import os
import random
import signal
import sys
from pathlib import Path

import torch

import dgc
from tests.forking import exit_codes, fork_ranks, warm_up
from tests.workers import Toy, flat, train, wrap

RANKS, EVERY, MOST = 2, 5, 20  # a life takes at most MOST steps before it is killed


def steps_of(folder: Path, rank: int) -> set[int]:
    return {int(path.stem) for path in (folder / str(rank)).glob("*.pt")}


def live(folder: Path, rank: int, steps: int, progress: int) -> None:
    """One rank from the newest checkpoint that all ranks have to the end."""
    rt = dgc.init("gloo", timeout_seconds=20)
    model = Toy()
    optimizer = wrap(model, dgc.DGC(density=0.1, min_selected=1, warmup_steps=50), None)
    first = max(set.intersection(*(steps_of(folder, each) for each in range(RANKS))), default=0)
    rt.comm.barrier()  # nobody writes while another looks
    own = folder / str(rank)
    if first:
        state = torch.load(own / f"{first}.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, steps):
        train(model, optimizer, range(step, step + 1))
        if (step + 1) % EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, own / "part")
            os.replace(own / "part", own / f"{step + 1}.pt")
            (own / f"{step + 1 - 3 * EVERY}.pt").unlink(missing_ok=True)
        os.write(progress, b".")
    (own / "digest").write_text(hashlib.sha256(flat(model).numpy().tobytes()).hexdigest())
    rt.comm.barrier()


def life(folder: Path, steps: int, chance: random.Random | None) -> bool:
    """Whether all ranks of one life ended well."""
    reader, writer = os.pipe()
    pids = fork_ranks(RANKS, lambda rank: live(folder, rank, steps, writer))
    os.close(writer)
    if chance:
        for _ in range(chance.randrange(RANKS * MOST)):
            os.read(reader, 1)
        for pid in chance.choice([pids, pids[:1], pids[1:]]):
            os.kill(pid, signal.SIGKILL)
    codes = exit_codes(pids)
    os.close(reader)
    # Killed, stopped by the other's death, or done: anything else is a defect.
    assert set(codes) <= {0, 3, -signal.SIGKILL}, codes
    return not any(codes)


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for rank in range(RANKS):
        (folder / str(rank)).mkdir()
    warm_up()
    steps, chance = 20 * MOST, random.Random(seed)
    for _ in range(kills):
        assert not life(folder, steps, chance)
    assert life(folder, steps, None)
    digests = {(folder / str(rank) / "digest").read_text() for rank in range(RANKS)}
    assert len(digests) == 1, digests
    print("digest", *digests, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
