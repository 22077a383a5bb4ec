"""Ranks as forked processes: many start in the time that one takes to import torch."""

import os
import socket
import sys
from collections.abc import Callable, Sequence

import torch

from dgc.comm.base import SelfCommunicator
from dgc.config import DGC
from dgc.errors import DGCError
from tests.workers import Toy, train, wrap


def warm_up() -> None:
    """Compile in this process, so that no rank need load the kernels after the fork."""
    torch.set_num_threads(1)
    model = Toy()
    train(model, wrap(model, DGC(density=0.1), SelfCommunicator()), range(2))


def fork_ranks(world_size: int, body: Callable[[int], None]) -> list[int]:
    """Start `body(rank)` on each rank, with the variables that torchrun sets; their process ids.

    A rank's exit code is 0, 3 after a `DGCError`, or 1 after any other error, which it prints.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(world_size)
    os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if not pid:
            _live(rank, body)
        pids.append(pid)
    return pids


def _live(rank: int, body: Callable[[int], None]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    code = 1
    try:
        body(rank)
        code = 0
    except DGCError:
        code = 3
    except BaseException as error:
        print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def exit_codes(pids: Sequence[int]) -> list[int]:
    """Wait for all; negative numbers are signals."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
