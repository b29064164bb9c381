"""Any loss of timm, under its own class name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError, require, suggestion
from lightning_lossplug.losses.base import Loss, upcast
from lightning_lossplug.losses.checks import check_floating
from lightning_lossplug.losses.embeddings import full_precision
from lightning_lossplug.registry import register


@register(
    "loss",
    "timm",
    family="adapter",
    paper="PyTorch Image Models",
    signature="logits_index",
)
class TimmLoss(Loss):
    """Adapter to a loss class of timm (``timm.loss``): a mean over the batch.

    When: a loss that has no card here, as those for many labels per image. Logits are upcast from half precision and
    autocast is off inside; the rest is timm's own. Shapes: logits [N, C],
    target [N] (class indices) or [N, C] (soft or multi-label), as the class takes them.

    Args:
        loss: Class name, as ``AsymmetricLossMultiLabel``, ``JsdCrossEntropy``, ``TwoWayLoss``, ``ZlprLoss``.
        parameters: Its arguments.
    """

    def __init__(self, loss: str, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        module = require("timm.loss", "timm", "the loss 'timm'")
        classes = {
            name: found
            for name, found in vars(module).items()
            if inspect.isclass(found) and issubclass(found, nn.Module)
        }
        if loss not in classes:
            raise LossplugError(f"there is no loss {loss!r}", where="timm", remedy=suggestion(str(loss), classes))
        try:
            self.loss = classes[loss](**(parameters or {}))
        except TypeError as error:
            raise LossplugError(str(error), where=f"parameters of {loss}") from None

    def forward(
        self, logits: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str | None = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: [N, C].
            target: [N] or [N, C].
            ignore_index: Rows with this class index are left out.
            reduction: ``mean`` is what timm has.

        Raises:
            LossplugError: Other shapes, or another reduction.
        """
        check_floating("timm", logits=logits)
        if reduction not in (None, "mean"):
            raise LossplugError(f"timm's losses are means, not reduction={reduction!r}", where=type(self.loss).__name__)
        if logits.ndim != 2 or target.shape not in (logits.shape[:1], logits.shape):
            raise LossplugError(
                f"targets {tuple(target.shape)} don't fit logits {tuple(logits.shape)}",
                where=type(self.loss).__name__,
                remedy="timm's losses take logits [N, C] and targets [N] or [N, C]",
            )
        if target.ndim == 1 and not target.is_floating_point() and bool((target == ignore_index).any()):
            kept = target != ignore_index
            if not bool(kept.any()):
                return 0 * upcast(logits).nan_to_num().sum()
            logits, target = logits[kept], target[kept]
        with full_precision(logits):
            return self.loss(upcast(logits), target)
