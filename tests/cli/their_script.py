"""A training script as a user has it: it knows nothing of this project."""

import argparse
import json
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--fail", action="store_true")
    options = parser.parse_args()
    L.seed_everything(0)
    x = torch.randn(256, 16)
    loader = torch.utils.data.DataLoader(list(zip(x, x[:, :4].argmax(1), strict=True)), 16)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=options.devices, logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    module = Net()
    trainer.fit(module, loader)
    if options.fail:
        raise SystemExit(7)
    zeros = float((module.net[0].weight == 0).float().mean())
    Path(f"after_{trainer.global_rank}.json").write_text(json.dumps({"zeros": zeros, "debug": options.debug}))
