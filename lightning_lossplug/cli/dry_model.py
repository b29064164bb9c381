"""The script ``lossplug check --model`` runs: a named model, random batches of the form it takes, a Trainer.

``python -m lightning_lossplug.cli.dry_model KIND:NAME OPTIONS BATCH TOKENS``
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lossplug.callbacks.distillation_base import named_teacher


class Step(LightningModule):
    """Cross-entropy of a model on random labels; AdamW."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a classifier, or the one a language model computes."""
        if isinstance(batch, dict):
            return self.model(**batch).loss
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


def batches(model: nn.Module, size: int, tokens: int) -> list[Any]:
    """Returns 64 random batches: token ids, or images of the size the model wants."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None:
        ids = [torch.randint(vocabulary, (size, tokens), generator=generator) for _ in range(64)]
        return [{"input_ids": x, "labels": x} for x in ids]
    configuration: Any = getattr(model, "pretrained_cfg", {})
    side = (
        getattr(getattr(model, "patch_embed", None), "img_size", None)
        or configuration.get("input_size", (3, 224, 224))[1:]
    )
    stem = next(parameter for parameter in model.parameters() if parameter.ndim == 4)
    image = torch.randn(size, stem.shape[1], *side, generator=generator)
    classes = int(getattr(model, "num_classes", 1000))  # type: ignore[arg-type]
    return [(image, torch.randint(classes, (size,), generator=generator)) for _ in range(64)]


def main(name: str, options: str, size: str, tokens: str) -> None:
    """Builds the model and fits it."""
    torch.manual_seed(0)
    model = named_teacher(name, json.loads(options), "lossplug check")
    data = batches(model, int(size), int(tokens))
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Step(model), DataLoader(data, batch_size=None))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
