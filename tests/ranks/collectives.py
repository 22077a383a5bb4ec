"""On each rank: every collective of the communicator against what it must give.

COLLECTIVES BACKEND [DEVICE]
"""

import sys
from functools import partial

import torch

import dgc

device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
arange, full = partial(torch.arange, device=device), partial(torch.full, device=device)
with dgc.init(sys.argv[1]) as rt:
    comm, rank, size = rt.comm, rt.rank, rt.world_size
    assert rt.local_size == size
    places = comm.all_gather(torch.tensor([rt.local_rank])).wait().view(-1)
    assert sorted(places.tolist()) == list(range(size))  # Open MPI does not number them in order
    for dtype in (torch.uint8, torch.int64, torch.float32, torch.float16, torch.bfloat16):
        mine = arange(5).to(dtype) + rank
        wanted = torch.stack([arange(5).to(dtype) + r for r in range(size)])
        handles = [comm.all_gather(mine), comm.all_gather(mine[:2].clone())]
        assert torch.equal(handles[1].wait(), wanted[:, :2]), dtype
        assert torch.equal(handles[0].wait(), wanted), dtype
    for dtype in (torch.int64, torch.float32, torch.float16, torch.bfloat16):
        summed = full((2, 3), rank + 1).to(dtype)
        assert comm.all_reduce(summed).wait() is summed
        assert torch.equal(summed, full((2, 3), size * (size + 1) // 2).to(dtype)), dtype
    rows = arange(size * 3).view(size, 3).float() * (rank + 1)
    row = comm.reduce_scatter(rows).wait()
    total = size * (size + 1) // 2
    assert torch.equal(row, arange(size * 3).view(size, 3)[rank].float() * total)
    sent = [full((rank + 2 * r,), 10 * rank + r, dtype=torch.uint8) for r in range(size)]
    for r, part in enumerate(comm.all_to_all(sent)):
        assert torch.equal(part, full((r + 2 * rank,), 10 * r + rank, dtype=torch.uint8))
    for tensor in (
        full((2, 2), float(rank)),
        torch.tensor(rank, device=device),
        torch.tensor([rank > 0], device=device),
    ):
        comm.broadcast_(tensor, root=size - 1)
        assert bool((tensor == (size - 1 if tensor.dtype != torch.bool else True)).all())
    half = comm.split(rank % 2)
    assert half.world_size == len(range(rank % 2, size, 2))
    assert half.rank == rank // 2
    ranks = half.all_gather(torch.tensor([rank])).wait().view(-1).tolist()
    assert ranks == list(range(rank % 2, size, 2))
    comm.barrier()
    if rank == 0:
        print("collectives agree")
