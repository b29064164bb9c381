"""Pseudo-Huber loss, with a turning point that may follow the diffusion timestep."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.losses.regression import RegressionLoss
from lightning_lossplug.registry import register


@register(
    "loss",
    "pseudo_huber",
    family="regression",
    paper="Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss",
    arxiv="2403.16728",
    signature="regression",
    needs=("timestep",),
)
class PseudoHuber(RegressionLoss):
    r"""Squared error near 0, absolute far away: :math:`l = s\,c\,(\sqrt{r^2 + c^2} - c)`, :math:`r` = pred - target.

    The slope is :math:`s\,c\,r/\sqrt{r^2+c^2}`, bounded by :math:`s\,c`. With a schedule the turning point is
    :math:`c(t) = c_{min}^{t/T}` (``exponential``: 1 at t = 0, ``c_min`` at t = T, so that noisy steps are the robust
    ones) or :math:`c_{min}^{1-t/T}` (``reverse``). Use it to fine-tune diffusion models, or any regressor, on data with
    outliers (arXiv 2403.16728).

    Args:
        c: Turning point > 0 without a schedule.
        c_min: Turning point in (0, 1] at the robust end of a schedule.
        schedule: ``none``, ``exponential`` or ``reverse``; the last two need ``timestep`` in the call.
        scale: 1 (the released code; :math:`r^2/2` near 0), or 2 (later trainers; :math:`r^2` for large c).
        num_timesteps: T of the schedule.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    takes_timestep = True

    def __init__(
        self,
        c: float = 0.1,
        c_min: float = 0.1,
        schedule: Literal["none", "exponential", "reverse"] = "none",
        scale: Literal[1, 2] = 1,
        num_timesteps: int = 1000,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        check_choice("pseudo_huber", "schedule", schedule, ("none", "exponential", "reverse"))
        if scale not in (1, 2):
            raise LossplugError(f"scale is {scale!r}, allowed are 1 and 2", where="pseudo_huber")
        self.c = check_number("pseudo_huber", "c", c, above=0)
        self.c_min = check_number("pseudo_huber", "c_min", c_min, above=0, most=1)
        self.num_timesteps = check_number("pseudo_huber", "num_timesteps", num_timesteps, least=1)
        self.schedule, self.scale = schedule, scale

    def turning_point(self, timestep: Tensor) -> Tensor:
        """Returns c at timesteps of [0, T] under the schedule."""
        done = timestep / self.num_timesteps
        return torch.exp((done if self.schedule == "exponential" else 1 - done) * math.log(self.c_min))

    def elements(self, pred: Tensor, target: Tensor, timestep: Tensor | None) -> Tensor:
        """``s c r^2 / (sqrt(r^2 + c^2) + c)``: the difference of the definition would cancel for small r."""
        c = torch.as_tensor(self.c, dtype=pred.dtype, device=pred.device)
        if self.schedule != "none":
            if timestep is None:
                raise LossplugError(
                    f"the schedule {self.schedule!r} needs the timestep of the batch",
                    where="pseudo_huber",
                    remedy="Call loss(pred, target, timestep=t), or set schedule='none'",
                )
            c = self.turning_point(timestep)
        error = pred - target
        root = torch.hypot(error, c.expand_as(error))  # no overflow of the square
        return self.scale * c * (error * (error / (root + c)))
