"""How often student and teachers agree on validation data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_lossplug.distillation.signals import Signals
from lightning_lossplug.distillation.taps import Call, Tap
from lightning_lossplug.distillation.teacher_cache import CachedTeacher
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.metrics import TeacherAgreement


def labels_of(found: Signals) -> Tensor | None:
    """Returns the class indices of the rows, where the targets are such."""
    y = found.target
    return None if y is None or y.is_floating_point() or y.shape != found.student.shape[:-1] else y


class AgreementMeter:
    """Counts, over one validation run and all processes, agreement with the teachers and the teachers' accuracy.

    Args:
        device: Where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        self.agreement, self.accuracy = TeacherAgreement().to(device), MeanMetric().to(device)
        self._labelled = False

    def update(self, found: Signals, ignore_index: int = -100) -> None:
        """Counts a batch of logits with classes last."""
        y, mask = labels_of(found), found.mask
        if y is not None and found.tokens:
            valid = torch.ne(y, ignore_index)
            mask = valid if mask is None else mask & valid
        for z in found.teachers:
            if z.shape == found.student.shape:
                self.agreement.update(found.student, z, mask)
            if y is not None:
                right = torch.eq(z.argmax(dim=-1), y)
                self.accuracy.update((right if mask is None else right[mask]).float())
                self._labelled = True

    def results(self) -> dict[str, Tensor]:
        """Returns ``val_agreement`` and, where there were labels, ``val_teacher_accuracy``."""
        found = {"val_agreement": self.agreement.compute()}
        if self._labelled:
            found["val_teacher_accuracy"] = self.accuracy.compute()
        return found


class AgreementLog(Callback):
    """Logs agreement with the teachers at each validation of a fit, when ``agreement`` is set.

    ``observers`` are called with the logits of each batch, of ``train`` or ``val``; with one of ``val`` the teachers
    are asked in validation too, once for all that want it.
    """

    where: str
    agreement: bool
    observers: dict[str, list[Callable[[Signals], None]]]
    _again: bool
    _reading = False
    _meter: AgreementMeter | None = None
    _student_tap: Tap | None
    _input_tap: Tap | None

    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """The teachers."""

    @abstractmethod
    def teacher_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments for the teachers."""

    @abstractmethod
    def signals(self, call: Call, teachers: list[Tensor], batch: Any, classes_last: bool = True) -> Signals:
        """Returns logits, targets and mask in step."""

    @abstractmethod
    def logits(self, network: nn.Module, output: Any) -> Tensor:
        """Returns the logits in what a teacher returned."""

    def answers(self) -> list[Tensor]:
        """Returns the teachers' logits for the last validation batch, in eval mode."""
        args, kwargs = self.teacher_call()
        found = []
        for network in self.networks():
            was = network.training
            network.eval()
            try:
                answer = network(*args, **kwargs)
            except LossplugError as error:
                if not isinstance(network, CachedTeacher):
                    raise
                remedy = "Say DistillationReport(on='train'), or make a cache of the validation data too"
                raise LossplugError(f"in validation: {error}", where=self.where, remedy=remedy) from None
            found.append(self.logits(network, answer))
            network.train(was)
        return found

    def tell(self, stage: str, found: Signals) -> None:
        """Hands the logits of a batch to those who asked for them; those of a second pass are no news."""
        if not self._again:
            for observe in self.observers[stage]:
                observe(found)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting, where asked."""
        fitting = self._student_tap is not None and not trainer.sanity_checking
        self._meter = AgreementMeter(pl_module.device) if self.agreement and fitting else None
        self._reading = fitting and (self.agreement or bool(self.observers["val"]))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Reads the student."""
        if self._reading:
            for tap in (self._student_tap, self._input_tap):
                if tap is not None:
                    tap.arm(with_grad_only=False)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Asks the teachers and counts."""
        if not self._reading or self._student_tap is None:
            return
        taps = [tap for tap in (self._student_tap, self._input_tap) if tap is not None]
        for tap in taps:
            tap.disarm()
        with trainer.precision_plugin.val_step_context():
            found = self.signals(self._student_tap.last(), self.answers(), batch)
            if self._meter is not None:
                self._meter.update(found)
            self.tell("val", found)
        for tap in taps:
            tap.forget()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what was counted."""
        if self._meter is not None:
            values = {f"{self.where}/{key}": value for key, value in self._meter.results().items()}
            pl_module.log_dict(values, rank_zero_only=False)  # type: ignore[arg-type]
            self._meter = None
        self._reading = False
