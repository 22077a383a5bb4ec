"""Ranks as real processes over gloo: several checks share one start, which costs seconds."""

import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[], Any]


def run_processes(world_size: int, checks: dict[str, Check]) -> dict[str, list[Any]]:
    """What each check returns on each rank, in order of rank.

    Each runs inside an initialised gloo process group. Where a check raises, its result is the text
    of the traceback, and that rank runs no more of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        # Daemons: after a timeout here, pytest does not wait at its end for a rank that hangs.
        mp.spawn(_rank, (world_size, port, checks, folder), nprocs=world_size, daemon=True)
        files = [Path(folder, str(rank)) for rank in range(world_size)]
        found = [pickle.loads(file.read_bytes()) for file in files]
    return {name: [each.get(name, "not run") for each in found] for name in checks}


def _rank(rank: int, world_size: int, port: int, checks: dict[str, Check], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception:
            found[name] = traceback.format_exc()
            break  # the other rank may wait for this one: the next check would mismatch
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))
    leave()


def leave() -> NoReturn:
    """End a rank that has passed, without torch 2.13's teardown.

    Under load 1 of 15 ranks hung in it: freeing a DistributedDataParallel drops the last reference
    to its gloo group while holding the interpreter's lock, for which gloo's thread may wait with
    the group locked. And a script whose last act is a plain `dist.all_gather` was ended by SIGABRT
    in most runs: gloo's thread freed the tensors when the interpreter was already shutting down.
    That scripts of dgc alone end normally is checked by those of tests/ranks that do not come here.
    """
    sys.stdout.flush()
    os._exit(0)
