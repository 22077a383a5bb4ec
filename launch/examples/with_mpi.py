"""mpi4py with dgc: mpirun -np 2 --oversubscribe python launch/examples/with_mpi.py"""

import torch
from mpi4py import MPI

import dgc

with dgc.init(backend="mpi") as rt:
    torch.manual_seed(rt.rank)  # each rank its own data
    model = torch.nn.Linear(64, 8)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = dgc.DistributedOptimizer(sgd, model.named_parameters(), dgc.DGC(density=0.01))
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    losses = MPI.COMM_WORLD.allgather(model(torch.ones(1, 64)).sum().item())
    assert len(set(losses)) == 1  # all ranks hold one model
