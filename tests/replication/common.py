"""What the evidence scripts share: data kept on the device, and a plain classifier trained on it with any loss."""

import copy
import functools

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lossplug.callbacks import SwapLoss
from lightning_lossplug.integrations import FashionMNISTData
from lightning_lossplug.integrations.data.order import epoch_order
from lightning_lossplug.integrations.schedule import cosine_per_step


class Classifier(pl.LightningModule):
    """What a user has: three convolutions, F.cross_entropy in the step, AdamW. It knows nothing of the callbacks."""

    def __init__(self, classes=10, lr=1e-3, weight_decay=1e-4, width=32):
        super().__init__()
        blocks, channels = [], 1
        for level in range(3):
            wide = width << level
            blocks += [nn.Conv2d(channels, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
            channels = wide
        head = [nn.Flatten(), nn.Linear(channels * 9, 8 * width), nn.ReLU(), nn.Linear(8 * width, classes)]
        self.net = nn.Sequential(*blocks, *head)
        self.lr, self.weight_decay = lr, weight_decay

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        z = self(x)
        self.log("accuracy", (z.argmax(1) == y).float().mean(), batch_size=len(y))
        self.log("loss", F.cross_entropy(z, y), batch_size=len(y))

    def configure_optimizers(self):
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=fused)
        return cosine_per_step(optimizer, self.trainer, warmup_fraction=0.05)


class Batches:
    """``(x, y, index)`` batches cut from tensors on the device: shuffled by ``(seed, epoch)``, or in order."""

    def __init__(self, x, y, batch_size, seed=None):
        self.x, self.y, self.batch_size, self.seed, self.epoch = x, y, min(batch_size, len(y)), seed, 0

    def __len__(self):
        full, rest = divmod(len(self.y), self.batch_size)
        return full + (self.seed is None and rest > 0)

    def __iter__(self):
        order = epoch_order(len(self.y), self.seed or 0, self.epoch, shuffle=self.seed is not None)
        order = order.to(self.y.device)
        self.epoch += 1
        for k in range(len(self)):
            index = order[k * self.batch_size : (k + 1) * self.batch_size]
            yield self.x[index], self.y[index], index


class KeepBest(pl.Callback):
    """Early stopping: keeps the weights of the epoch with the least value of a validation metric."""

    def __init__(self, monitor="loss"):
        self.monitor, self.least, self.state = monitor, float("inf"), None

    def on_validation_epoch_end(self, trainer, pl_module):
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.least:
            self.least, self.state = value, copy.deepcopy(pl_module.state_dict())


class Curve(pl.Callback):
    """Keeps the validation metrics of every epoch."""

    def __init__(self):
        self.values = []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(module, train, epochs, callbacks=(), validate=None, device="cuda"):
    """One quiet Trainer.fit."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        log_every_n_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, train, validate)
    return module.to(device)


def train_classifier(run, train, test, device):
    """Trains :class:`Classifier` with the run's loss, from the run's seed; returns it and its test curve."""
    torch.manual_seed(run["seed"])
    module, curve = Classifier(lr=run["lr"], width=run["width"]), Curve()
    parameters = dict(run["parameters"])
    if parameters.get("dataset_size") == "all":
        parameters["dataset_size"] = len(train[1])
    index = 2 if "dataset_size" in parameters else None
    swap = [] if run["loss"] is None else [SwapLoss(run["loss"], parameters, sample_index=index)]
    batches = Batches(*train, run["batch"], run["seed"])
    fit(module, batches, run["epochs"], [*swap, curve], Batches(*test, 2500), device)
    return module, curve.values


@torch.no_grad()
def predict(module, x, batch_size=2500):
    """Logits in evaluation mode."""
    module.eval()
    return torch.cat([module(part) for part in x.split(batch_size)])


@functools.cache
def fashion_mnist(root, limit, device):
    """Train (five sixths of the training file), balanced val (the rest) and test as normalised tensors."""
    data = FashionMNISTData(root=root, val_split=1 / 6, seed=0)
    data.setup("fit")
    parts = {"train": data.train_set, "val": data.val_set, "test": data.test_set}
    wanted = {name: list(range(len(part)))[:limit] for name, part in parts.items()}
    return {name: tuple(t.to(device) for t in part.__getitems__(wanted[name])) for name, part in parts.items()}
