"""The learning-rate schedule of the built-in modules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_lossplug.errors import LossplugError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


def warmup_cosine(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Returns the learning-rate factor: a linear rise to 1, then half a cosine down to 0.

    With ``w = round(warmup_fraction * total_steps)``: ``(step + 1) / (w + 1)`` below ``w``, then
    ``(1 + cos(pi * (step - w) / (total_steps - w))) / 2``, and 0 from ``total_steps`` on.
    """
    warmup = round(warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def cosine_per_step(optimizer: Optimizer, trainer: Trainer, warmup_fraction: float) -> OptimizerLRSchedulerConfig:
    """Returns what ``configure_optimizers`` has to return: the optimizer with :func:`warmup_cosine` per step.

    Raises:
        LossplugError: ``warmup_fraction`` is outside of 0 to 1, or the Trainer trains without end.
    """
    if not 0.0 <= warmup_fraction <= 1.0:
        raise LossplugError(f"warmup_fraction is {warmup_fraction}", remedy="Give a number from 0 to 1")
    total = trainer.estimated_stepping_batches
    if math.isinf(total) or total < 0:
        raise LossplugError("a cosine schedule needs an end", where="Trainer", remedy="Set max_epochs or max_steps")
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, int(total), warmup_fraction))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
