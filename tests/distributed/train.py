"""One run that tests start, kill and resume: a timm model on digits with a swapped loss and N:M sparsity.

Writes ``last.ckpt`` every few steps, one line of ``log.jsonl`` per step, and ``final_<rank>.pt`` (weights, masks,
clock) at the end. With ``--slow`` each step waits a little, so that a signal can fall anywhere in it.
"""

import argparse
import json
import os
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lossplug.callbacks import ExactResume, NMSparsity, SwapLoss
from lightning_lossplug.integrations import DigitsData, ImageClassifier


class StepLog(pl.Callback):
    """Every logged value of every step; a resumed run appends."""

    def __init__(self, path: Path, slow: float) -> None:
        self.path, self.slow = path, slow

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(self.slow)
        if trainer.is_global_zero:
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(("val", "test"))}
            with self.path.open("a") as file:
                file.write(
                    json.dumps({"step": trainer.global_step, "batch": batch_idx, **values}, sort_keys=True) + "\n"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--recipe", default="nm_srste")
    parser.add_argument("--score", default="magnitude")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--every", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pl.seed_everything(1, verbose=False)
    folder = arguments.folder
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        folder.mkdir(parents=True, exist_ok=True)
    module = ImageClassifier(
        "vit_tiny_patch16_224",
        num_classes=10,
        in_chans=1,
        img_size=8,
        model_kwargs={
            "patch_size": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "drop_rate": 0.1,
            "proj_drop_rate": 0.1,
        },
    )
    saver = ModelCheckpoint(folder, filename="last", every_n_train_steps=arguments.every, enable_version_counter=False)
    last = folder / "last.ckpt"
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=0.5,
        num_sanity_val_steps=0,
        callbacks=[
            SwapLoss("poly_loss", {"epsilon": 2.0}),
            NMSparsity(2, 8, arguments.recipe, score=arguments.score),
            saver,
            StepLog(folder / "log.jsonl", arguments.slow),
            ExactResume(),
        ],
    )
    data = DigitsData(batch_size=32, train_limit=640, with_index=True)
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    state["clock"] = torch.tensor([trainer.global_step, trainer.callbacks[1].step])
    torch.save(state, folder / f"final_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
