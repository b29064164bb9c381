"""A small training run that can be killed after any batch; used in this process and as a DDP script.

As a script: ``python resume_runs.py FOLDER MODE...`` with the modes ``straight``, ``killed`` and ``resumed``; under two
gloo processes each rank leaves ``FOLDER/MODE-RANK.pt`` with the batches it saw and its final weights.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lossplug.callbacks.exact_resume import ExactResume
from lightning_lossplug.integrations.data.digits import DigitsData
from lightning_lossplug.integrations.schedule import cosine_per_step


class Killed(Exception):
    pass


class Net(pl.LightningModule):
    """Dropout and batch norm: a step depends on the random state, and state beyond the weights has to survive."""

    def __init__(self, estimate=True, die_after=None, dropout=0.3):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 10)
        )
        self.estimate, self.die_after, self.seen = estimate, die_after, []

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        if self.die_after is not None and len(self.seen) >= self.die_after:
            raise Killed
        self.seen.append((self.current_epoch, batch_idx, index.tolist()))
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return cosine_per_step(optimizer, self.trainer, 0.1) if self.estimate else optimizer


class SaveAfter(pl.Callback):
    """Writes a checkpoint after so many batches."""

    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if len(model.seen) == self.batches:
            trainer.save_checkpoint(self.path)


def run(
    folder,
    *,
    ckpt=None,
    die_after=None,
    estimate=True,
    data=None,
    loader=None,
    exact=True,
    dropout=0.3,
    every=3,
    epochs=2,
    init_seed=1,
    callbacks=(),
    **trainer_options,
):
    """Trains; returns the module and the newest checkpoint. A resumed run starts from other weights and seeds."""
    pl.seed_everything(init_seed if ckpt is None else init_seed + 99, verbose=False)
    model = Net(estimate=estimate, die_after=die_after, dropout=dropout)
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": epochs,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_train_batches": 10,
            "limit_val_batches": 2,
            "val_check_interval": 4,
            "callbacks": [checkpoints, *callbacks, *([ExactResume()] if exact else [])],
            **trainer_options,
        }
    )
    data = {"train_dataloaders": loader} if loader is not None else {"datamodule": data or digits()}
    try:
        trainer.fit(model, ckpt_path=ckpt, **data)
    except Killed:
        assert die_after is not None
    return model, newest(folder)


def digits(**options):
    return DigitsData(**{"batch_size": 16, "with_index": True, "seed": 3, **options})


def newest(folder):
    return max(Path(folder).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def assert_continues(straight, killed, resumed, done):
    """The resumed run saw exactly the batches left after ``done``, and ends in the same bits."""
    assert killed.seen == straight.seen[: len(killed.seen)]
    assert resumed.seen == straight.seen[done:]
    assert 0 < done < len(straight.seen)
    other = resumed.state_dict()
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, other[name]), name


def main():
    folder = Path(sys.argv[1])
    ddp = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
    checkpoint = folder / "checkpoint.ckpt"
    for mode in sys.argv[2:]:
        if mode == "straight":
            model, _ = run(folder / mode, **ddp)
        elif mode == "killed":
            model, _ = run(folder / mode, die_after=15, callbacks=[SaveAfter(13, checkpoint)], **ddp)
        else:
            model, _ = run(folder / mode, ckpt=str(checkpoint), **ddp)
        torch.save({"seen": model.seen, "weights": model.state_dict()}, folder / f"{mode}-{model.global_rank}.pt")


if __name__ == "__main__":
    main()
