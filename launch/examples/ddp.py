"""DDP with dgc: torchrun --nproc-per-node 2 launch/examples/ddp.py"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dgc

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())  # each rank its own data
model = torch.nn.Linear(64, 8)
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
state = dgc.register(ddp, optimizer, compression=dgc.DGC(density=0.01))
for _ in range(10):
    optimizer.zero_grad()
    ddp(torch.randn(32, 64)).square().mean().backward()
    optimizer.step()
if dist.get_rank() == 0:
    print(f"{state.stats()['compression_ratio']:.0f} times fewer bytes")
dist.destroy_process_group()
