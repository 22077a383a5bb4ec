"""Two optimizers, and collectives of the script's own, where ranks use different parameters."""

import sys

import torch
import torch.distributed as dist
from torch import nn

import dgc

backend, opened_by = sys.argv[1:]
if opened_by == "script":
    dist.init_process_group(backend)
    dist.new_group([0])  # which rank 1 does not count
ALL = dgc.DGC(density=1.0, value_bits=32)
with dgc.init("auto" if opened_by == "script" else backend, timeout_seconds=20) as rt:
    assert rt.world_size == 2
    twins = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    first, second = (
        dgc.DistributedOptimizer(torch.optim.SGD(q.parameters(), lr=0.1), q.named_parameters(), ALL)
        for q in twins
    )
    for _ in range(3):
        first.zero_grad()
        second.zero_grad()
        x = torch.ones(1, 4)
        loss = 100 * twins[1](x).sum()
        if rt.rank == 1:
            loss = loss + twins[0](x).sum()
        loss.backward()
        mean = loss.detach().view(1)
        if dist.is_initialized():
            dist.all_reduce(mean)
        first.synchronize()
        second.synchronize()
        assert twins[0].weight.grad.tolist() == [[0.5] * 4], twins[0].weight.grad
        assert twins[1].weight.grad.tolist() == [[100.0] * 4], twins[1].weight.grad
        first.step()
        second.step()
    for _ in range(5):  # what was made for the first is used again
        q = nn.Linear(4, 1)
        sgd = torch.optim.SGD(q.parameters(), lr=0.1)
        third = dgc.DistributedOptimizer(sgd, q.named_parameters(), ALL)
        q(torch.ones(1, 4)).sum().backward()
        third.step()
    if dist.is_initialized():
        groups = len(dist.distributed_c10d._world.pg_names)
        assert groups <= 2 + 1 + 4, groups  # a name before is given back after the next is made
    rt.comm.barrier()
    if rt.rank == 0:
        print("each has its own mean", flush=True)
if opened_by == "script":
    dist.destroy_process_group()
