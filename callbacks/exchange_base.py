"""What the callbacks that exchange gradients in few bytes share: what they refuse, save, log and say."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from lightning_lossplug.callbacks.qat_gradient import GradientAdaptiveQAT
from lightning_lossplug.callbacks.sam import SAM
from lightning_lossplug.communication import Compressor, ErrorFeedback, GradientExchange
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number


class ExchangeCallback(Callback):
    """Owns the exchange of a run under DDP.

    Args:
        rule: What is remembered.
        compressor: What is sent.
        min_numel: Smaller tensors travel uncompressed.
        seed: Of random compressors.

    Raises:
        LossplugError: A compressor that doesn't suit the rule, or ``min_numel`` below 1.
    """

    def __init__(self, rule: ErrorFeedback, compressor: Compressor, min_numel: int, seed: int) -> None:
        self.rule, self.compressor, self.seed = rule, compressor, seed
        self.rule.check(self.compressor)
        self.where = type(self).__name__
        self.min_numel = int(check_number(self.where, "min_numel", min_numel, least=1))
        self.exchange: GradientExchange | None = None
        self._saved: dict[str, Any] | None = None
        self._alone = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what can't be compressed, before the model is wrapped."""
        if stage != "fit":
            return
        self._saved = None
        strategy = trainer.strategy
        self._alone = isinstance(strategy, SingleDeviceStrategy)
        if self._alone:
            rank_zero_warn(f"{self.where} does nothing on one device: there is nothing to exchange")
            return
        if not isinstance(strategy, DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
            raise LossplugError(
                f"gradients are exchanged by {type(strategy).__name__}, which has no communication hook for them",
                where=self.where,
                remedy="Use strategy='ddp'",
            )
        if strategy._ddp_comm_hook is not None:
            raise LossplugError(
                "the strategy brings a communication hook of its own, and DDP takes one",
                where=self.where,
                remedy="Leave out ddp_comm_hook, or this callback",
            )
        halves = [name for name, parameter in pl_module.named_parameters() if parameter.dtype == torch.float16]
        if getattr(trainer.precision_plugin, "scaler", None) is not None or halves:
            raise LossplugError(
                "float16 gradients carry a loss scale that changes, which the remembered errors would mix",
                where=self.where,
                remedy="Use precision='bf16-mixed' or '32-true'",
            )
        if not pl_module.automatic_optimization:
            raise LossplugError(
                "manual optimization may exchange gradients several times per step",
                where=self.where,
                remedy="Use automatic optimization",
            )
        others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in others:
            if other is not self and isinstance(other, (SAM, GradientAdaptiveQAT, ExchangeCallback)):
                why = (
                    "is there already" if isinstance(other, ExchangeCallback) else "exchanges gradients twice per step"
                )
                raise LossplugError(f"{type(other).__name__} {why}", where=self.where, remedy="Keep one of the two")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the saved states until the model is wrapped."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._saved = checkpoint["callbacks"].get(self.state_key)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the exchange and restores its states; nothing has been exchanged yet."""
        if self._alone:
            return
        wrapped = trainer.strategy.model
        if not isinstance(wrapped, DistributedDataParallel):
            raise LossplugError(f"the model is wrapped as {type(wrapped).__name__}", where=self.where, remedy="Use DDP")
        exchange = GradientExchange(
            self.rule, self.compressor, pl_module.named_parameters(), self.min_numel, seed=self.seed
        )
        saved, self._saved = self._saved, None
        if saved is not None and not exchange.load_state(saved):
            rank_zero_info(
                f"{self.where}: the checkpoint was written by {saved['ranks']} processes, now there are "
                f"{trainer.world_size}: what differs between processes starts again from what they share"
            )
        if saved is None and self.exchange is not None and trainer.global_step:
            exchange.adopt(self.exchange)  # fit called again on the same objects
        self.exchange = exchange
        self.begin(trainer, pl_module, wrapped, exchange, saved)
        for note in exchange.notes(trainer.world_size):
            rank_zero_info(f"{self.where}: {note}")

    @abstractmethod
    def begin(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        wrapped: DistributedDataParallel,
        exchange: GradientExchange,
        saved: dict[str, Any] | None,
    ) -> None:
        """Connects the exchange; ``saved`` is the state of the checkpoint, if there is one."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs bytes and errors when the Trainer's loggers are due."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.exchange is not None and not self._alone and every and self.exchange.step % every == 0:
            values = {f"{self.where}/{key}": value for key, value in self.exchange.logs().items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what was sent."""
        if self.exchange is not None and not self._alone:
            sent, dense = self.exchange.bytes_sent, self.exchange.bytes_dense
            rank_zero_info(
                f"{self.where}: each process sent {sent} bytes in {self.exchange.step} messages, "
                f"{sent / max(dense, 1):.2%} of {dense} uncompressed"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the states of all processes; every process gets here, rank 0 writes the file."""
        state = self._saved  # on one device, and before training: as it was read
        if self.exchange is not None and not self._alone:
            state = self.gather(pl_module)
        if state is not None:
            checkpoint["callbacks"][self.state_key] = state

    def gather(self, pl_module: LightningModule) -> dict[str, Any]:
        """Returns what a checkpoint holds; a collective call."""
        if self.exchange is None:
            raise LossplugError("nothing has been exchanged yet", where=self.where, remedy="Save after training began")
        return self.exchange.gather_state()


def given(**options: Any) -> dict[str, Any]:
    """Returns the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
