"""Mixed precision over MPI: rank 1 finds an inf at step 20, and all ranks skip that step alone.

ONE_INF DEVICE
"""

import sys

import torch
from torch import nn

import dgc

device = sys.argv[1]
with dgc.init("mpi") as rt:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    config = dgc.DGC(density=0.05, min_selected=1, bucket_bytes=1000)
    optimizer = dgc.DistributedOptimizer(sgd, model.named_parameters(), config, scaler=scaler)
    scales = []
    for step in range(30):
        generator = torch.Generator().manual_seed(100 * step + rt.rank)
        x = torch.randn(8, 16, generator=generator).to(device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = (model(x).squeeze(1).float() - x[:, 0]).square().mean()
        scaler.scale(loss * (torch.inf if step == 20 and rt.rank == 1 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert optimizer.stats()["skipped_steps"] == 1
    assert scales == [1024.0] * 20 + [512.0] * 10, scales
    for memory in optimizer.state_dict()["memory"].values():
        assert all(tensor.isfinite().all() for tensor in memory.values())
    flat = torch.cat([p.detach().view(-1) for p in model.parameters()])
    assert (rt.comm.all_gather(flat).wait() == flat).all()
    if rt.rank == 0:
        print("one step was skipped")
