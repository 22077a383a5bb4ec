"""An mpi4py program: even and odd ranks each train together, messages of its own under way."""

from unittest.mock import patch

import pytest
import torch
from mpi4py import MPI

import dgc
from dgc.comm.mpi import MpiCommunicator
from dgc.comm.runtime import default_communicator
from dgc.errors import ConfigError
from tests.ranks.launched import digest
from tests.threads import run_ranks

world = MPI.COMM_WORLD
part = world.Split(world.rank % 2, world.rank)
left, right = (world.rank - 1) % world.size, (world.rank + 1) % world.size
got = torch.empty(1000)
aside = world.Split(MPI.UNDEFINED if world.rank else 0)
if world.rank:
    with pytest.raises(ConfigError, match="COMM_NULL"):
        MpiCommunicator(aside)
funneled = patch.object(MPI, "Query_thread", lambda: MPI.THREAD_FUNNELED)
with funneled:
    MpiCommunicator(part).close()  # on a CPU autograd calls from the thread that calls it
    with (
        patch("torch.cuda.is_available", lambda: True),
        pytest.raises(ConfigError, match="SERIALIZED"),
    ):
        MpiCommunicator(part)
asked = [part.Irecv(got), world.Irecv(torch.empty(5), left, tag=1)]
found = digest(MpiCommunicator(part))
assert found == run_ranks(part.size, digest)[0]
asked += [world.Isend(torch.ones(5), right, tag=1)]
asked += [part.Isend(torch.full((1000,), 7.0), (part.rank + 1) % part.size)]
MPI.Request.Waitall(asked)
assert bool((got == 7).all())
assert world.allgather(found) == [found] * world.size
with dgc.init("mpi") as rt:  # all ranks, after parts of them
    everybody = digest(rt.comm)
    assert everybody == run_ranks(world.size, digest)[0] != found
rt.close()  # again
with pytest.raises(ConfigError, match=r"call dgc\.init\(\) first"):
    default_communicator()
if world.rank == 0:
    print("an MPI program as before")
