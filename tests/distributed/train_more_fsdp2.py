"""Fits with QAT, or a teacher that learns, under FSDP2 and under DDP on two ranks; writes what each rank ended with.

Every run sees other data per rank, so that scales set from one rank's batch would show.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from train_qat import Attending, Data, Net

from lightning_lossplug.callbacks import QAT, SAM, GradientAdaptiveQAT, NMSparsity, OnlineDistillation, SwapLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.surgery.shards import full


class Wide(Net):
    """In float64: two passes of two networks that learn of each other make much of what is rounded otherwise."""

    def __init__(self):
        super().__init__()
        self.double()

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0].double(), batch[1]], batch_idx)


def teacher(dtype=torch.float32):
    torch.manual_seed(1)
    return OnlineDistillation(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype), "bdkd")


RUNS = {
    "lsq": (Net, lambda: [QAT(4, 4)], {}),
    "many options": (
        Net,
        lambda: [QAT(3, 4, granularity="group", group_size=8, init_batches=2), NMSparsity(2, 4, "nm_srste")],
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ),
    "attention": (Attending, lambda: [QAT(4, 4, attention_bits=4)], {}),
    "ewgs": (Net, lambda: [QAT(4, 4, weight="ewgs", activation="ewgs")], {}),
    "dorefa, pact": (Net, lambda: [QAT(4, 4, weight="dorefa", activation="pact")], {}),
    "two bits": (Net, lambda: [QAT(2, 8)], {}),
    "self_compress": (Net, lambda: [QAT(8, 8, weight="self_compress")], {}),
    "gaqat": (Net, lambda: [GradientAdaptiveQAT(4, 4, rho=0.1, disorder_window=8, freeze_fraction=0.5)], {}),
    "gaqat, accumulated": (
        Net,
        lambda: [GradientAdaptiveQAT(3, 4, sharpness="sam", granularity="group", group_size=8, perturb_scales=True)],
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ),
    # Six steps: what is rounded otherwise (1e-8) moves a code or a mask sooner or later.
    "sam": (
        Net,
        lambda: [SAM(0.1), NMSparsity(2, 4, "nm_srste"), QAT(4, 4)],
        {"gradient_clip_val": 0.5, "limit_train_batches": 3},
    ),
    "asam": (Wide, lambda: [SAM(0.5, adaptive=True), teacher(torch.float64)], {}),
    "online": (Net, lambda: [teacher()], {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "together": (Net, lambda: [SwapLoss("poly_loss"), NMSparsity(2, 4, "nm_srste"), QAT(8, 8), teacher()], {}),
}


def sharded(kind, root_only):
    class Sharded(kind):
        """Layers of one's own shards, or all in one group that stays gathered between the passes."""

        def configure_model(self):
            if hasattr(self, "done"):
                return
            self.done = True
            layers = [] if root_only else [m for m in self.net if any(True for _ in m.parameters())]
            for layer in (*layers, self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    return Sharded


class Save(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def fit(name, kind, strategy, path=None, resume=False):
    _, callbacks, options = RUNS[name]
    module, made = kind(), callbacks()
    optimizer = {"lsq": lambda: torch.optim.AdamW(module.parameters(), lr=0.01)}.get(name)
    if optimizer is not None:
        module.configure_optimizers = optimizer
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        callbacks=[*made, *([Save(path)] if path and not resume else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=Data(), ckpt_path=path if resume else None)
    found = {key: full(value) for key, value in module.state_dict().items()}
    for callback in made:
        if isinstance(callback, OnlineDistillation):
            found |= {f"teacher.{key}": value for key, value in callback.teachers.state_dict().items()}
    return module.global_rank, found


def fsdp2(shards=False):
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=shards)


if __name__ == "__main__":
    torch.set_num_threads(1)
    home, found = Path(sys.argv[1]), {}
    for run in sys.argv[2:] or RUNS:
        plain = RUNS[run][0]
        rank, ddp = fit(run, plain, "ddp")
        found[run] = {"ddp": ddp}
        for root_only in (False, True):
            kind = sharded(plain, root_only)
            found[run][f"fsdp2, {root_only}"] = fit(run, kind, fsdp2())[1]
        if run in ("lsq", "gaqat", "sam"):
            for shards in (False, True):
                kind, path = sharded(plain, False), home / f"{run}_{shards}.ckpt"
                found[run][f"straight, {shards}"] = fit(run, kind, fsdp2(shards), path)[1]
                found[run][f"resumed, {shards}"] = fit(run, kind, fsdp2(shards), path, resume=True)[1]
    for callback in (SAM(0.1), GradientAdaptiveQAT(4, 4)):
        name = type(callback).__name__
        RUNS[name] = (Net, lambda callback=callback: [callback], {})
        try:
            fit(name, sharded(Net, False), ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2))
        except LossplugError as error:
            found.setdefault("refused", {})[name] = str(error)
    torch.save(found, home / f"rank{rank}.pt")
