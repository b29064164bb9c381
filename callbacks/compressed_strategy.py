"""Compressed gradients as a strategy: ``Trainer(strategy="lossplug_ddp_ef21")``."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_lossplug.callbacks.compressed_gradients import CompressedGradients

NAME = "lossplug_ddp"
RULES = ("ef14", "econtrol", "ef21", "ef21_w", "ef21_sgdm")


class CompressedDDPStrategy(DDPStrategy):
    """DDP whose gradients travel in few bytes: a :class:`CompressedGradients` that needs no place in the callbacks.

    It puts that callback into the Trainer, first in its list, so hook, state, checkpoints, logs and refusals are those
    of the callback, and a run can change from one form to the other at a checkpoint. Once this module is imported,
    Lightning knows it by name with the defaults of every rule: ``lossplug_ddp`` (EF21-SGDM), ``lossplug_ddp_ef14``,
    ``lossplug_ddp_econtrol``, ``lossplug_ddp_ef21``, ``lossplug_ddp_ef21_w`` and ``lossplug_ddp_ef21_sgdm``.

    Args:
        rule: As for :class:`CompressedGradients`, like all others down to ``seed``.
        compressor: What is sent.
        ratio: Share of the entries that ``topk`` and ``randk`` send.
        block_size: Entries per sent entry of ``block_topk``.
        levels: Steps above zero of ``qsgd``.
        low_rank: Columns of the factors of ``lowrank``.
        beta: Share of the new gradient in ``ef21_sgdm``.
        eta: Share of the error in ``econtrol``.
        weights: One per process for ``ef21_w``.
        init: ``zero`` or ``dense``.
        min_numel: Smaller tensors travel uncompressed.
        seed: Of random compressors.
        process_group_backend: ``gloo`` or ``nccl``; None: by the device.
        find_unused_parameters: As for DDP: some parameters get no gradient in a step.

    Raises:
        LossplugError: What :class:`CompressedGradients` refuses, now or at the start of a fit.
    """

    def __init__(
        self,
        rule: str = "ef21_sgdm",
        compressor: str = "topk",
        ratio: float | None = None,
        block_size: int | None = None,
        levels: int | None = None,
        low_rank: int | None = None,
        beta: float | None = None,
        eta: float | None = None,
        weights: list[float] | None = None,
        init: Literal["zero", "dense"] | None = None,
        min_numel: int = 1024,
        seed: int = 0,
        process_group_backend: str | None = None,
        find_unused_parameters: bool = False,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, find_unused_parameters=find_unused_parameters)
        self.callback = CompressedGradients(
            rule, compressor, ratio, block_size, levels, low_rank, beta, eta, weights, init, min_numel, seed
        )

    def connect(self, model: Any) -> None:
        """Puts the callback into the model's Trainer, unless it is there since an earlier fit."""
        super().connect(model)
        module: LightningModule = model
        callbacks: list[Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
        if self.callback not in callbacks:
            callbacks.insert(0, self.callback)


def register_strategies() -> None:
    """Makes the names known to Lightning."""
    for name, rule in {NAME: "ef21_sgdm", **{f"{NAME}_{rule}": rule for rule in RULES}}.items():
        if name not in StrategyRegistry:
            text = f"DDP with gradients compressed by Top-k and {rule}"
            StrategyRegistry.register(name, CompressedDDPStrategy, description=text, rule=rule)


register_strategies()
