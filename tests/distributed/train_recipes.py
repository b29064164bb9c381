"""Every N:M recipe on two ranks with bf16, accumulation and clipping (and, under DDP, averaged weights), then resumed.

``train_recipes.py STRATEGY FOLDER [RECIPE ...]``: each rank writes what every recipe ended with. What a strategy can't
take writes its message instead.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import NMSparsity
from lightning_lossplug.sparsity import ASTAdamW, STEPAdamW
from lightning_lossplug.surgery import latent, plugged_layers
from lightning_lossplug.surgery.shards import full

EPOCHS, MIDDLE = 4, 4  # two optimizer steps an epoch
RECIPES = {
    "nm_oneshot": {},
    "nm_ste": {},
    "nm_srste": {"lambda_w": 0.05},
    "mdgf_linear": {},
    "mdgf_exponential": {},
    "sdgf_stepwise": {},
    "sdgf_geometric": {"k": 2},
    "nm_sste": {},
    "nm_cast": {"mask_update_every": 3},
    "nm_step": {},
    "nm_ast": {"lambda_w": 0.05, "increase_step": 4, "mask_update_every": 2},
    "nm_bimask": {"permute_every": 3, "num_candidates": 3},
    "nm_transposable": {"mask_update_every": 2},
    "nm_tsrste": {"mask_update_every": 2, "dense_finish_fraction": 0.0},
    "nm_maskllm": {},
}
LAYERS = ["net.0", "net.2", "net.4"]


class Net(pl.LightningModule):
    def __init__(self, recipe: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
        self.recipe = recipe

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        options = {"lr": 1e-2, "weight_decay": 0.1}
        if self.recipe == "nm_step":
            return STEPAdamW(self.parameters(), **options, t_max=3)
        return (ASTAdamW if self.recipe == "nm_ast" else torch.optim.AdamW)(self.parameters(), **options)


class Sharded(Net):
    def configure_model(self) -> None:
        if hasattr(self, "done"):
            return
        self.done = True
        for layer in (self.net[0], self.net[2], self.net[4], self.net):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
        data = TensorDataset(x, x[:, :8].argmax(1))
        return DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))


class Middle(pl.Callback):
    """Saves half-way (every rank has to take part), and draws the same noise in a resumed run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(100 * trainer.global_step + batch_idx)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step == MIDDLE and trainer.ckpt_path is None:
            trainer.save_checkpoint(self.path)


def fit(folder, recipe, strategy, checkpoint=None):
    """Trains; returns masks, whole weights, and what a product reads, or the message of a refusal."""
    module = (Sharded if strategy == "fsdp2" else Net)(recipe)
    sparse = NMSparsity(2, 4, recipe, include=LAYERS, **RECIPES[recipe])
    sharded = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    average = [EMAWeightAveraging(decay=0.8)] if strategy == "ddp" else []
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(**sharded) if strategy == "fsdp2" else "ddp",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        use_distributed_sampler=False,
        callbacks=[sparse, *average, Middle(folder / f"{recipe}.ckpt")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, datamodule=Data(), ckpt_path=checkpoint)
    except LossplugError as error:
        return {"rank": trainer.global_rank, "refused": str(error)}
    module.eval()
    layers = dict(plugged_layers(module))
    transforms = {name: layer.weight_transforms["sparsity"] for name, layer in layers.items()}
    weights = {name: full(latent(layer)).clone() for name, layer in layers.items()}
    return {
        "rank": trainer.global_rank,
        "step": sparse.step,
        "masks": {name: transform.mask.clone() for name, transform in transforms.items()},
        "weights": weights,
        "used": {name: transforms[name](weight).detach() for name, weight in weights.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen, home = sys.argv[1], Path(sys.argv[2])
    runs = {}
    for name in sys.argv[3:] or RECIPES:
        straight = fit(home, name, chosen)
        path = home / f"{name}.ckpt"
        runs[name] = {"straight": straight, "resumed": fit(home, name, chosen, path) if path.exists() else None}
    torch.save(runs, home / f"rank{straight['rank']}.pt")
