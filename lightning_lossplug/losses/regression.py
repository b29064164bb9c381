"""Base class of the regression losses: a prediction against a target of the same shape, element by element."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.checks import check_floating, check_same_shape, reduce_weighted, row_weights, upcast


class RegressionLoss(Loss, ABC):
    """A loss of ``(prediction, target)`` of one shape; a subclass writes :meth:`elements`.

    Half-precision input is computed in float32; autocast is off inside. ``none`` returns the shape of the target,
    ``mean`` divides by the number of elements, or by the summed sample weights.
    """

    takes_timestep: ClassVar[bool] = False

    @abstractmethod
    def elements(self, pred: Tensor, target: Tensor, timestep: Tensor | None) -> Tensor:
        """Returns the loss of every element, in the shape of ``pred`` (float32 or float64)."""

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        timestep: Tensor | int | None = None,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            pred: Predictions, any shape.
            target: Targets, the same shape.
            timestep: Diffusion timesteps, one number or [B]; only for losses on a schedule.
            sample_weight: Weights >= 0 of the elements, in the shape of ``target`` or of its leading dimensions.
                Elements of weight 0 are left out, even where they are NaN.
            denominator: What ``mean`` divides by instead.
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: Shapes or dtypes that don't fit, or a timestep where none is used.
        """
        where = type(self).__name__
        check_floating(where, pred=pred)
        check_same_shape(where, pred=pred, target=target)
        if target.is_complex() or target.dtype == torch.bool:
            raise LossplugError(f"target has dtype {target.dtype}, expected numbers", where=where)
        if timestep is not None and not self.takes_timestep:
            raise LossplugError("takes no timestep", where=where, remedy="Use pseudo_huber for a loss on a schedule")
        with torch.autocast(pred.device.type, enabled=False):
            p = upcast(pred)
            t = target.to(p)
            weight = None
            if sample_weight is not None:
                weight = row_weights(sample_weight, p, p, where)
                p, t = torch.where(weight == 0, 0, p), torch.where(weight == 0, 0, t)
            step = None if timestep is None else self._timesteps(timestep, p)
            rows = self.elements(p, t, step)
            return reduce_weighted(rows, weight, reduction or self.reduction, p, denominator)

    def _timesteps(self, timestep: Tensor | int, pred: Tensor) -> Tensor:
        steps = torch.as_tensor(timestep, device=pred.device).to(pred.dtype)
        if steps.ndim and steps.shape != pred.shape[:1]:
            raise LossplugError(
                f"timestep {tuple(steps.shape)} doesn't fit predictions {tuple(pred.shape)}",
                where=type(self).__name__,
                remedy="Give one number, or one per sample",
            )
        return steps.reshape(steps.shape + (1,) * (pred.ndim - steps.ndim)) if steps.ndim else steps
