"""Horovod's calls with dgc: mpirun -np 2 --oversubscribe python launch/examples/with_horovod.py"""

import torch

import dgc
import dgc.horovod as hvd  # in place of horovod.torch

hvd.init()
torch.manual_seed(hvd.rank())  # each rank its own data
model = torch.nn.Linear(64, 8)
sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), dgc.DGC(density=0.01))
for _ in range(10):
    optimizer.zero_grad()
    model(torch.randn(32, 64)).square().mean().backward()
    optimizer.step()
if hvd.rank() == 0:
    print(optimizer.stats()["compression_ratio"])
