"""Lightning's Trainer on each rank: accumulation, checkpoints, and going on."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dgc.integrations.lightning import DGCCallback
from tests.integrations.loops import CONFIG, check, flat, net, samples
from tests.processes import leave

STEPS = 3


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(epochs: int, resume: str | None = None) -> tuple[Tensor, pl.Trainer]:
    """`STEPS` steps an epoch, from the start or from a checkpoint."""
    model, callback = Regression(), DGCCallback(CONFIG)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(samples(16 * STEPS), batch_size=4), ckpt_path=resume)
    check(callback.state, model, STEPS * (epochs - 1 if resume else epochs))
    return flat(model), trainer


path = str(Path(sys.argv[1], "half.ckpt"))
_, half = train(1)
half.save_checkpoint(path)
whole, _ = train(2)
assert torch.equal(whole, train(2, resume=path)[0])
leave()
