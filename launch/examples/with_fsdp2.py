"""FSDP2 with dgc between hosts: torchrun --nproc-per-node 4 launch/examples/with_fsdp2.py"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dgc

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
model = fully_shard(torch.nn.Linear(64, 8), mesh=mesh["shard"])
sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
state = dgc.apply_fsdp2(model, mesh["replicate"].get_group(), sgd, dgc.DGC(density=0.01))
torch.manual_seed(dist.get_rank())  # each rank its own data
for _ in range(10):
    sgd.zero_grad()
    model(torch.randn(32, 64)).square().mean().backward()
    sgd.step()
if dist.get_rank() == 0:
    print(state.stats()["compression_ratio"])
dist.destroy_process_group()
