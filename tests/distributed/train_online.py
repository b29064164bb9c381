"""Two fits under DDP: BD-KD and SwitOKD, each rank with every second sample, different teachers to begin with."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lossplug.callbacks import Distillation, DistillationReport, OnlineDistillation, SelfDistillation


def network(width: int, seed: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(width) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(16, width), middle, nn.ReLU(), nn.Linear(width, 4))


class Net(pl.LightningModule):
    """A user's module."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.net = network(8, 0, norm)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def samples():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    return TensorDataset(x, (x @ torch.randn(16, 4, generator=generator)).argmax(1))


class Tokens(Net):
    """Rows of tokens, some without a label."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())


def sequences():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (64, 5), generator=generator)
    kept = torch.randint(1, 6, (64, 1), generator=generator)
    return TensorDataset(torch.randn(64, 5, 16, generator=generator), y.masked_fill(torch.arange(5) >= kept, -100))


class Data(pl.LightningDataModule):
    """Every second sample for each rank, in order: the sampler that Lightning adds would shuffle."""

    def __init__(self, make=samples):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        data = self.make()
        return DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=False))


def fit(module, callback, make=samples, more=(), **options):
    pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        callbacks=[callback, *more],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, datamodule=Data(make))
    return {"net": module.net.state_dict(), "extras": callback.extras().state_dict()}


if __name__ == "__main__":
    torch.set_num_threads(1)

    rank = int(os.environ.get("LOCAL_RANK", 0))
    plain, found = Net(), {}
    report = DistillationReport(sys.argv[1], on="train", plot=False)
    online = OnlineDistillation(network(16, 5 + rank))  # rank 0's teacher is taken by both
    found["plain"] = fit(plain, online, more=[report])
    details = next(iter(report.details.values()))
    found["plain"]["report"] = {k: torch.tensor(details.confidence[k]).nan_to_num() for k in ("count", "student")}
    found["switokd"] = fit(Net(norm=True), OnlineDistillation(network(16, 5, norm=True), "switokd"))
    features = Distillation(network(12, 7, norm=True), feature_loss="fitnet", layers={"2": "2"})
    found["fitnet"] = fit(Net(norm=True), features)
    mixed = Distillation(network(12, 7), feature_loss="fitnet", layers={"0": ["0", "2"], "3": ["2", "3"]})
    found["learned layers"] = fit(Net(), mixed)
    found["ema"] = fit(Net(norm=True), SelfDistillation(0.9))
    found["dot"] = fit(Net(), Distillation(network(12, 7), dot_delta=0.05))
    window = Distillation(network(12, 7), ce_weight=0.0, normalize="window")
    found["window"] = fit(Tokens(), window, sequences, accumulate_grad_batches=2)
    ranks = Distillation(network(12, 7), ce_weight=0.0, normalize="window")
    found["ranks"] = fit(Tokens(), ranks, sequences)
    off = {"ce_weight": 0.0, "teacher_ce_weight": 0.0}
    online = OnlineDistillation(network(12, 7), normalize="window", **off)
    found["online window"] = fit(Tokens(), online, sequences, accumulate_grad_batches=2)
    online = OnlineDistillation(network(12, 7), normalize="window", **off)
    found["online ranks"] = fit(Tokens(), online, sequences)
    torch.save(found, Path(sys.argv[1]) / f"rank{plain.global_rank}.pt")
