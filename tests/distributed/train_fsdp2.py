"""Fits with N:M masks on two FSDP2 ranks (or in one process), straight and resumed half-way.

``train_fsdp2.py FOLDER``: two ranks; each writes what it ended with, per recipe.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lossplug.callbacks import NMSparsity, SparsityHealth, read_health
from lightning_lossplug.surgery import latent, plugged_layers
from lightning_lossplug.surgery.shards import full

STEPS, MIDDLE = 8, 4
LAYERS = ["net.0", "net.2", "net.4"]
RECIPES = {"nm_oneshot": {}, "nm_srste": {"lambda_w": 0.05}}


class Net(pl.LightningModule):
    """The layers are made in __init__, where the callback finds them, and sharded in configure_model."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        # 7 rows: the shards of two ranks are unequal
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 7))
        self.sharded, self.used = sharded, {}
        for name in LAYERS:
            self.get_submodule(name).register_forward_pre_hook(self._keep(name))

    def _keep(self, name):
        def hook(layer, args):
            self.used[name] = layer.weight.detach().clone()  # gathered for the product: what it really uses

        return hook

    def configure_model(self) -> None:
        if not self.sharded or hasattr(self, "done"):
            return
        self.done = True
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2], self.net[4], self.net):
            fully_shard(layer, mesh=mesh)

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Data(pl.LightningDataModule):
    """Sixteen samples a step, however many ranks share them; a batch per step, so that any step can be resumed."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(16, 16, generator=generator)
        data = TensorDataset(x, x[:, :7].argmax(1))
        if self.ranks == 1:
            return DataLoader(data, 16)
        return DataLoader(data, 16 // self.ranks, sampler=DistributedSampler(data, shuffle=False))


class Middle(pl.Callback):
    """Saves half-way; every rank has to take part."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step == MIDDLE:
            trainer.save_checkpoint(self.path)


def fit(folder, recipe, devices, checkpoint=None, shards=False):
    """Trains; the checkpoint is one file, or a folder of shards.

    Returns masks, whole latent weights, what the products used, and the rows of this rank's shards.
    """
    module = Net(devices > 1)
    sparse = NMSparsity(2, 4, recipe, include=LAYERS, **RECIPES[recipe])
    name = f"{recipe}{'_shards' * shards}"
    health = SparsityHealth(str(folder / f"{name}_{devices}_{bool(checkpoint)}"), every=2, plot=False)
    sharded = {"data_parallel_size": devices, "tensor_parallel_size": 1, "save_distributed_checkpoint": shards}
    trainer = pl.Trainer(
        max_epochs=STEPS,
        accelerator="cpu",
        devices=devices,
        strategy=ModelParallelStrategy(**sharded) if devices > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=[sparse, health] if checkpoint else [sparse, health, Middle(folder / f"{name}.ckpt")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Data(devices), ckpt_path=checkpoint)
    layers = dict(plugged_layers(module))
    return {
        "rank": trainer.global_rank,
        "step": sparse.step,
        "used": module.used,
        "health": read_health(health.folder),
        "masks": {name: layer.weight_transforms["sparsity"].mask.clone() for name, layer in layers.items()},
        "weights": {name: full(latent(layer)).clone() for name, layer in layers.items()},
        "rows": {name: len(getattr(latent(layer), "_local_tensor", latent(layer))) for name, layer in layers.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    runs = {}
    for name in RECIPES:
        straight = fit(home, name, 2)
        runs[name] = {"straight": straight, "resumed": fit(home, name, 2, home / f"{name}.ckpt")}
        fit(home, name, 2, shards=True)
        runs[name]["from shards"] = fit(home, name, 2, home / f"{name}_shards.ckpt", shards=True)
    torch.save(runs, home / f"rank{runs[name]['straight']['rank']}.pt")
