"""Two fits under DDP, QAT and gradient-adaptive QAT, on different data per rank; writes what each rank ended with."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lossplug.callbacks import QAT, GradientAdaptiveQAT


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Attending(Net):
    """The same on four tokens, with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (4, 4)), Attention(), nn.Flatten(), nn.Linear(16, 4))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


class Data(pl.LightningDataModule):
    """Rank 1 sees values three times as large, so that scales set from its own batch would differ."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 16, generator=generator)
        y = (x @ torch.randn(16, 4, generator=generator)).argmax(1)
        x[1::2] *= 3
        data = TensorDataset(x, y)
        return DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))


def fit(callback, kind=Net, **options):
    module = kind()
    pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, datamodule=Data())
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    plain = fit(QAT(4, 4))
    found["qat"] = plain.net.state_dict()
    found["attention"] = fit(QAT(4, 4, attention_bits=4), Attending).net.state_dict()
    gaqat = GradientAdaptiveQAT(4, 4, disorder_window=8, disorder_threshold=0.4)
    module = fit(gaqat, accumulate_grad_batches=2)
    found["gaqat"] = module.net.state_dict()
    found["gate"] = gaqat.technique.gate.state_dict()
    torch.save(found, Path(sys.argv[1]) / f"rank{module.global_rank}.pt")
