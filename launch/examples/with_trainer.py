"""Hugging Face's Trainer with dgc: torchrun --nproc-per-node 2 launch/examples/with_trainer.py"""

import torch
from transformers import Trainer, TrainingArguments

import dgc
from dgc.integrations.transformers import register


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 8)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


model = Model()
sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
args = TrainingArguments(
    "out/trainer",
    max_grad_norm=0,  # in its place DGC(clip_norm=1.0)
    max_steps=10,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
)
data = [{"x": x} for x in torch.randn(200, 64)]
trainer = Trainer(model, args, train_dataset=data, optimizers=(sgd, None))
callback = register(trainer, dgc.DGC(density=0.01))  # before train
trainer.train()
print(callback.state.stats()["compression_ratio"])
torch.distributed.destroy_process_group()
