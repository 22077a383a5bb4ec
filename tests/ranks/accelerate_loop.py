"""Accelerate's own loop on each rank: accumulation, clipping, saving, and going on bit for bit."""

import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator

from dgc.integrations.accelerate import register
from tests.integrations.loops import CONFIG, check, flat, net, samples
from tests.processes import leave

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
assert dist.get_world_size() == 2


def train(steps: int, *, resume: bool) -> torch.Tensor:
    """Train `steps` steps, save the state, train as many again; or only the second half."""
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = torch.utils.data.DataLoader(samples(4 * 8 * steps), batch_size=4)
    model, sgd, data = accelerator.prepare(model, sgd, data)
    state = register(accelerator, model, sgd, CONFIG)
    done = 0
    for epoch in range(2):
        if resume and epoch == 0:
            accelerator.load_state(sys.argv[1])
            continue
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - y).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    done += 1
                sgd.step()
                sgd.zero_grad()
        if epoch == 0:
            accelerator.save_state(sys.argv[1])
    assert done == 2 * steps * (1 if resume else 2)
    check(state, model, done)
    accelerator._models.clear(), accelerator._optimizers.clear(), accelerator._dataloaders.clear()
    accelerator._save_model_state_pre_hook.clear(), accelerator._load_model_state_pre_hook.clear()
    return flat(model)


whole = train(4, resume=False)
assert torch.equal(whole, train(4, resume=True))
leave()
