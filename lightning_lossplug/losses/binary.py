"""Base class of losses of one logit per element with targets 0 and 1."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import LabelError, Loss, upcast
from lightning_lossplug.losses.reduction import check_reduction, reduce_rows


class BinaryLoss(Loss, ABC):
    """A loss of logits and 0/1 targets of the same shape (one class, or several independent ones).

    Half-precision logits are upcast to float32, the result is float32, and autocast is off inside.

    Args:
        ignore_index: Elements with this target contribute nothing.
        reduction: ``none`` (shape of the logits, 0 where ignored), ``mean`` over kept elements, or ``sum``.
    """

    def __init__(self, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.ignore_index = ignore_index

    @abstractmethod
    def elements(self, s: Tensor, t: Tensor) -> Tensor:
        """Returns the loss of each of R logits ``s`` (float32 or float64) at targets ``t`` of the same dtype."""

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        ignore_index: int | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: Any shape.
            target: 0 and 1 (bool, integer or float), shape of ``logits``.
            sample_weight: Weight of each element, a shape that broadcasts to that of the logits.
            denominator: What ``mean`` divides by instead of the summed weights; in detection the number of positives.
            ignore_index: Overrides the module's for this call.
            reduction: Overrides the module's for this call.

        Raises:
            LabelError: A target outside [0, 1] (an ``IndexError``; checked on CPU).
            LossplugError: Shapes or dtypes that don't fit.
        """
        name = type(self).__name__
        reduction = self.reduction if reduction is None else reduction
        check_reduction(reduction)
        ignore_index = self.ignore_index if ignore_index is None else ignore_index
        if not logits.is_floating_point():
            raise LossplugError(f"logits have dtype {logits.dtype}, expected a floating dtype", where=name)
        if target.shape != logits.shape:
            raise LossplugError(
                f"targets {tuple(target.shape)} don't fit logits {tuple(logits.shape)}",
                where=name,
                remedy="This loss takes one logit per 0/1 target, both of one shape",
            )
        with torch.autocast(logits.device.type, enabled=False):
            s, keep = upcast(logits).reshape(-1), target.reshape(-1) != ignore_index
            t = torch.where(keep, target.reshape(-1).to(s.dtype), 0)
            if t.device.type == "cpu" and not torch.compiler.is_compiling() and bool(((t < 0) | (t > 1)).any()):
                raise LabelError(
                    f"targets reach from {float(t.min())} to {float(t.max())}, expected 0 and 1", where=name
                )
            kept = keep.to(s.dtype)
            rows = torch.where(keep, self.elements(s, t), 0)
            if sample_weight is not None:
                try:
                    scale = sample_weight.expand_as(logits).reshape(-1).to(s)
                except RuntimeError:
                    raise LossplugError(
                        f"sample_weight {tuple(sample_weight.shape)} doesn't broadcast to {tuple(logits.shape)}",
                        where=name,
                    ) from None
                rows, kept = rows * scale, kept * scale
            return reduce_rows(rows.reshape(logits.shape), kept.sum(), reduction, s, denominator)
