"""Lightning with dgc: torchrun --nproc-per-node 2 launch/examples/with_lightning.py"""

import torch
from pytorch_lightning import LightningModule, Trainer

import dgc
from dgc.integrations.lightning import DGCCallback


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 8)

    def training_step(self, batch):
        return self.linear(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


options = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": "out/lightning"}
callback = DGCCallback(dgc.DGC(density=0.01))
trainer = Trainer(devices=2, strategy="ddp", callbacks=[callback], **options)
trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(200, 64), batch_size=10))
print(callback.state.stats()["compression_ratio"])
torch.distributed.destroy_process_group()
