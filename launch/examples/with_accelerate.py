"""Accelerate with dgc: torchrun --nproc-per-node 2 launch/examples/with_accelerate.py"""

import torch
from accelerate import Accelerator

import dgc
from dgc.integrations.accelerate import register

accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)  # each rank its own data
model = torch.nn.Linear(64, 8)
sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model, sgd = accelerator.prepare(model, sgd)
state = register(accelerator, model, sgd, dgc.DGC(density=0.01))  # after prepare
for _ in range(10):
    sgd.zero_grad()
    accelerator.backward(model(torch.randn(32, 64)).square().mean())
    sgd.step()
accelerator.print(state.stats()["compression_ratio"])
accelerator.end_training()
