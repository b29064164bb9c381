"""Saying no to strategies that cut parameters into shards."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_lossplug.errors import LossplugError


def refuse_sharding(trainer: Trainer, where: str, remedy: str = "Use DDP or one device") -> None:
    """Raises before anything is trained, for a callback that works on whole parameters.

    Args:
        trainer: The Trainer.
        where: The callback.
        remedy: What to do instead.

    Raises:
        LossplugError: The strategy shards parameters.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise LossplugError(
            f"the parameters are sharded by {type(trainer.strategy).__name__}", where=where, remedy=remedy
        )
