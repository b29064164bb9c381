"""Base class of certified training: losses of lower bounds of the margins, and how to get those from a model."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.checks import check_floating, check_same_shape, reduce_weighted, row_weights, upcast
from lightning_lossplug.losses.interval import Channels, input_box
from lightning_lossplug.schedules import AnySchedule, Progress, as_schedule


def margin_cross_entropy(margins: Tensor) -> Tensor:
    """Returns ``log(1 + sum_k exp(-m_k))`` [N] of margins [N, C-1]: cross-entropy of logits ``[0, -m]`` at class 0."""
    return F.pad(-margins, (1, 0)).logsumexp(dim=1)


class MarginLoss(Loss, ABC):
    """A loss of margins [N, C-1]: lower bounds of ``z_y - z_k`` over a box, and the margins at one point of it.

    :meth:`forward` takes the two; ``from_model`` of the subclasses gets them from a network first.

    Args:
        eps: Radius of the box around an input >= 0, in the unit of the model's input (divide by the standard deviations
            of its normalisation); a number or one per channel. Only ``from_model`` needs it.
        eps_schedule: Factor of ``eps`` over training progress, usually a rise from 0 to 1; None: always 1.
        low: Smallest possible input, a number or one per channel; None: no limit.
        high: Largest possible input.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        eps: Channels | None = None,
        eps_schedule: AnySchedule | None = None,
        low: Channels | None = None,
        high: Channels | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        if eps is not None and not bool((torch.as_tensor(eps) >= 0).all()):
            raise LossplugError(f"eps is {eps}, allowed is >= 0", where=type(self).__name__)
        self.eps, self.eps_schedule, self.low, self.high = eps, eps_schedule, low, high

    @abstractmethod
    def rows(self, lower: Tensor, point: Tensor | None, progress: Progress | None) -> Tensor:
        """Returns the loss [N] of margin bounds and margins at the point, both [N, C-1] (float32 or float64)."""

    def reduced(
        self,
        lower: Tensor,
        point: Tensor | None,
        weight: Tensor | None,
        reduction: str,
        denominator: Tensor | float | None,
        progress: Progress | None,
    ) -> Tensor:
        """Returns the reduced loss; for losses that are more than a mean of rows."""
        return reduce_weighted(self.rows(lower, point, progress), weight, reduction, lower, denominator)

    def forward(
        self,
        lower: Tensor,
        point: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            lower: Lower bounds of the margins [N, C-1].
            point: Margins at a point of the box, clean or attacked, [N, C-1].
            sample_weight: Weights >= 0 of the samples [N].
            denominator: What ``mean`` divides by instead.
            reduction: Overrides the module's for this call.
            progress: Where training stands, for parameters on a schedule.

        Raises:
            LossplugError: Shapes or dtypes that don't fit, or margins at a point that the loss needs and didn't get.
        """
        where = type(self).__name__
        check_floating(where, lower=lower)
        if lower.ndim != 2:
            raise LossplugError(f"margins have shape {tuple(lower.shape)}, expected [N, C-1]", where=where)
        if point is not None:
            check_floating(where, point=point)
            check_same_shape(where, lower=lower, point=point)
        with torch.autocast(lower.device.type, enabled=False):
            m = upcast(lower)
            p = None if point is None else upcast(point).to(m.dtype)
            weight = None if sample_weight is None else row_weights(sample_weight, m.shape[:1], m, where)
            return self.reduced(m, p, weight, reduction or self.reduction, denominator, progress)

    def box(self, x: Tensor, progress: Progress | None, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Returns the box around inputs at a point of training, its radius times ``factor``.

        Raises:
            LossplugError: ``eps`` was not set.
        """
        if self.eps is None:
            raise LossplugError("eps is not set", where=type(self).__name__, remedy="Give eps, e.g. 8 / 255 / std")
        if self.eps_schedule is not None:
            factor *= scheduled(self.eps_schedule, progress, type(self).__name__)
        return input_box(x, torch.as_tensor(self.eps, dtype=x.dtype) * factor, self.low, self.high)


def scheduled(value: float | AnySchedule, progress: Progress | None, where: str) -> float:
    """Returns the value of a number or schedule at a point of training.

    Raises:
        LossplugError: A schedule without progress.
    """
    if isinstance(value, (int, float)):
        return float(value)
    if progress is None:
        raise LossplugError(
            "a parameter on a schedule needs the training progress", where=where, remedy="Pass progress="
        )
    return as_schedule(value)(progress)


def l1_norm(model: nn.Module) -> Tensor:
    """Returns the sum of absolute weights of linear and convolutional layers, without biases."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    norms = [layer.weight.abs().sum() for layer in model.modules() if isinstance(layer, kinds)]
    if not norms:
        raise LossplugError("no linear or convolutional layer to regularise", where=type(model).__name__)
    return torch.stack(norms).sum()
