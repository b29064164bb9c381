"""Saying no to strategies that cut parameters into shards."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

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


def keeps_all_on_every_rank(strategy: Strategy) -> bool:
    """Tells whether every process has whole parameters, gradients and optimizer states: one device, or DDP."""
    # Lightning's class for DeepSpeed is one of DDP
    return isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)


def shards_data_only(strategy: Strategy) -> bool:
    """Tells whether the strategy is FSDP2 and nothing else: parameters are sharded, every process has its own data."""
    return isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() == 1


def refuse_all_but_data(trainer: Trainer, where: str) -> None:
    """Raises for a callback that works on whole parameters or on shards of them, where each process has its own data.

    Raises:
        LossplugError: The strategy shards parameters, and is not FSDP2 alone.
    """
    if not shards_data_only(trainer.strategy):
        remedy = "Use DDP, FSDP2 (ModelParallelStrategy with tensor_parallel_size=1) or one device"
        refuse_sharding(trainer, where, remedy)


def refuse_deepspeed(trainer: Trainer, where: str) -> None:
    """Raises in setup, for a callback that reads or changes gradients, steps or what a checkpoint holds.

    DeepSpeed's engine takes gradients out of the parameters as they come, steps flat copies of parts of them, and is no
    optimizer that could be hooked: such a callback would do nothing there, or something else.

    Args:
        trainer: The Trainer.
        where: The callback.

    Raises:
        LossplugError: The strategy is DeepSpeed's.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise LossplugError(
            "gradients and steps are DeepSpeed's own, where this callback can't reach them",
            where=where,
            remedy="Use DDP or FSDP2 (ModelParallelStrategy)",
        )
