"""Two fits with SAM under DDP: plain SGD, then a gradient scaler with a non-finite loss on one rank only."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lossplug.callbacks import SAM

RHO = 0.2


class Net(pl.LightningModule):
    """Keeps the weights that each pass saw."""

    def __init__(self, spike: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        self.spike, self.seen = spike, []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.net[0].weight.detach().clone())
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss * float("inf") if self.spike and batch_idx == 2 and self.global_rank == 1 else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def samples():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    return TensorDataset(x, (x @ torch.randn(16, 4, generator=generator)).argmax(1))


class Data(pl.LightningDataModule):
    """Every second sample for each rank, in order: the sampler that Lightning adds would shuffle."""

    def train_dataloader(self):
        data = samples()
        return DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=False))


def fit(module, **options):
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        callbacks=[SAM(RHO)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, datamodule=Data())
    return {"net": module.net.state_dict(), "seen": module.seen}


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain, spiked = Net(), Net(spike=True)
    found = {"plain": fit(plain)}
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    found["spiked"] = fit(spiked, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    found["scale"] = scaler.get_scale()
    torch.save(found, Path(sys.argv[1]) / f"rank{plain.global_rank}.pt")
