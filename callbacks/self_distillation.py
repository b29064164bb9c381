"""The student's own average as its teacher."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_lossplug.callbacks.distillation import Distillation
from lightning_lossplug.callbacks.distillation_base import Pick, Scheduled
from lightning_lossplug.distillation import DistillationLoss, FeatureLoss
from lightning_lossplug.distillation.networks import average_into, freeze, plain_copy
from lightning_lossplug.losses.checks import check_number


class SelfDistillation(Distillation):
    """Distils from the student's own running average: an EMA teacher, made at the start of the fit.

    After each step the optimizer took, the teacher's parameters move to ``decay`` of themselves plus the rest of the
    student's; buffers are copied. The teacher is in eval mode, outside the module, and in the checkpoint under the
    callback. Features are read by the same paths on both sides.

    Args:
        decay: In [0, 1]; 1 keeps the weights the run started with.
        loss: Name of a loss of logits, or an object; null for features only.
        parameters: Parameters of a loss given by name.
        weight: Factor of the loss: a number, a schedule, or ``{fraction of the run: value}``.
        temperature: Moves the loss's temperature; None: as in ``parameters``.
        ce_weight: Factor of the module's own loss.
        feature_loss: Name of a loss of features, or an object.
        feature_parameters: Its parameters, if given by name.
        feature_weight: Factor of the loss of features.
        layers: Paths in the network whose outputs are compared.
        student: Path of the sub-module that returns the logits; None: the only child with parameters.
        output: Where the logits are in what the network returns: key, position or function; None finds them.
        targets: Key or position of the targets in the batch, or a function of it; None finds them.
        shift: Whether position t stands for token t + 1; None: for causal language models.

    Raises:
        LossplugError: As :class:`Distillation`; a decay outside [0, 1].
    """

    _must_be_trained = False
    beside_shards = False

    def __init__(
        self,
        decay: float = 0.999,
        loss: str | DistillationLoss | None = "kd",
        parameters: dict[str, Any] | None = None,
        weight: Scheduled = 1.0,
        temperature: Scheduled | None = None,
        ce_weight: Scheduled = 1.0,
        feature_loss: str | FeatureLoss | None = None,
        feature_parameters: dict[str, Any] | None = None,
        feature_weight: Scheduled = 1.0,
        layers: list[str] | None = None,
        student: str | None = None,
        output: Pick = None,
        targets: Pick = None,
        shift: bool | None = None,
    ) -> None:
        super().__init__(
            "ema",
            loss,
            parameters,
            None,
            weight,
            temperature,
            ce_weight,
            feature_loss,
            feature_parameters,
            feature_weight,
            {path: path for path in layers or ()},
            student,
            None,
            output,
            targets,
            shift,
        )
        self.decay = check_number(self.where, "decay", decay, least=0, most=1)

    def _make_teacher(self, teacher: Any, options: dict[str, Any] | None) -> nn.Module | None:
        return None

    def extras(self) -> nn.ModuleList:
        """The average, and what the losses train."""
        return nn.ModuleList([self.trained, *self.networks()])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the student, which has its weights now, and goes on from the average of a resumed run."""
        self._refuse_sharding(trainer)
        self._detach_taps()
        root = pl_module.get_submodule(self._path(pl_module))
        self.teacher = plain_copy(root)
        freeze(self.teacher)
        self._attach(pl_module)
        super().on_fit_start(trainer, pl_module)

    def _check_fingerprint(self) -> None:
        self._fingerprint = None

    def after_step(self) -> None:
        """Moves the average."""
        super().after_step()
        assert self.teacher is not None
        average_into(self.teacher, self.student_network, self.decay)
