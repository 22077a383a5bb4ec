"""Hugging Face's Trainer on each rank: accumulation, clipping, checkpoints, and going on."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from dgc.integrations.transformers import register
from tests.integrations.loops import CONFIG, check, flat, net, samples
from tests.processes import leave

STEPS = 6


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def train(resume: bool, adam: bool = False) -> Tensor:
    """Six steps with a checkpoint after three; or only the steps after that."""
    model = Regression()
    args = TrainingArguments(
        sys.argv[1],
        max_steps=STEPS,
        save_steps=STEPS // 2,
        save_strategy="no" if adam else "steps",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        max_grad_norm=1.0 if adam else 0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = [{"x": x, "labels": y} for x, y in samples(16 * STEPS)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    own: dict[str, Any] = {} if adam else {"optimizers": (sgd, None)}
    trainer = Trainer(model, args, train_dataset=data, **own)
    callback = register(trainer, CONFIG)
    trainer.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-3" if resume else None)
    assert trainer.state.global_step == STEPS
    check(callback.state, model, STEPS // 2 if resume else STEPS)
    return flat(model)


whole = train(resume=False)
assert torch.equal(whole, train(resume=True))
assert not torch.equal(whole, train(resume=False, adam=True))
leave()
