"""A module, data, loaders and a Trainer that the tests of callbacks share."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Plain(pl.LightningModule):
    """What a user has: a network, F.cross_entropy in the step, Adam."""

    def __init__(self, dropout=0.0, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.1)


def data(n=64, batch_size=8, index=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 16, generator=generator)
    y = (x @ torch.randn(16, 4, generator=generator)).argmax(1)
    columns = (x, y, torch.arange(n)) if index else (x, y)
    return DataLoader(TensorDataset(*columns), batch_size)


class OrderedLoader:
    """Batches in order, without random numbers, and where it is: a resumed run goes on in mid-epoch."""

    def __init__(self):
        self.batches = list(data())
        self.position = self.first = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        first, self.first = self.first, 0
        for i in range(first, len(self.batches)):
            self.position = (i + 1) % len(self.batches)
            yield self.batches[i]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.first = state["position"]


class Manual(Plain):
    """Plain, with manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


def make_trainer(**options):
    defaults = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
    }
    return pl.Trainer(**(defaults | options))


def state_of(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
