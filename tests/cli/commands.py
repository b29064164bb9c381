"""The arguments of one tiny run, and ``lossplug`` in this process."""

import contextlib
import io
from typing import NamedTuple

from lightning_lossplug.cli.main import main

NETWORK = "{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"
MODEL = [
    "--model=ImageClassifier",
    "--model.model=vit_tiny_patch16_224",
    "--model.num_classes=10",
    "--model.in_chans=1",
    "--model.img_size=8",
    f"--model.model_kwargs={NETWORK}",
]
DATA = ["--data=DigitsData", "--data.train_limit=128"]
TRAINER = [
    "--trainer.max_steps=4",
    "--trainer.accelerator=cpu",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
FIT = ["fit", *MODEL, *DATA, *TRAINER]
SWAP = ["--trainer.callbacks+=SwapLoss"]
LOSS = "--trainer.callbacks.loss"
SPARSE = ["--trainer.callbacks+=NMSparsity", "--trainer.callbacks.n=2", "--trainer.callbacks.m=4"]


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> Done:
    """Runs ``lossplug`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())
