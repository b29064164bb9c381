"""Small modules that know nothing of distillation, data in a fixed order, and a Trainer without noise."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 8, 4


def network(width=16, seed=0, classes=CLASSES, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, classes)
    )


class Plain(pl.LightningModule):
    """What a user has."""

    def __init__(self, optimizer="sgd", dropout=0.0, as_dict=False):
        super().__init__()
        self.net = network(6, seed=1, dropout=dropout)
        self.optimizer, self.as_dict = optimizer, as_dict

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return {"loss": loss, "n": 1} if self.as_dict else loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]


class Split(Plain):
    """Two networks in a row, called by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Linear(FEATURES, 6)
        self.head = nn.Linear(6, CLASSES)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.net(batch["x"]).relu()), batch["label"])


def samples(n=64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, FEATURES, generator=g)
    return TensorDataset(x, (x @ torch.randn(FEATURES, CLASSES, generator=g)).argmax(1))


def data(n=64, batch_size=8):
    # a generator of its own: a plain loader would draw from the global one at another moment when a run is resumed
    return DataLoader(samples(n), batch_size, generator=torch.Generator().manual_seed(0))


def trainer(*callbacks, **options):
    defaults = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**(defaults | options))


def same(a, b):
    """Whether two state dicts are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
