"""A logarithmic variant of the squared error for data in [0, 1]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.losses.regression import RegressionLoss
from lightning_lossplug.registry import register


@register(
    "loss",
    "lmse",
    family="regression",
    paper="Concise Logarithmic Loss Function for Robust Training of Anomaly Detection Model",
    arxiv="2201.05748",
    signature="regression",
    experimental=True,
)
class LogMSE(RegressionLoss):
    r"""Experimental logarithmic squared error :math:`l = -\log(1 - r^2 + \epsilon)`, r = pred - target in [-1, 1].

    It has the curvature of the squared error at 0 and a slope that grows without bound towards :math:`|r| = 1`. The
    equation of the paper (arXiv 2201.05748) was not available: this form is chosen here after its description, and is
    no reproduction of it. Use it for autoencoders with a sigmoid output, where large errors should weigh more.

    Args:
        eps: > 0; bounds the loss by :math:`-\log\epsilon` at :math:`|r| = 1`.
        outside: What an error beyond 1 does: ``raise`` (reads a value back from an accelerator in every call), or
            ``clamp`` (counts as 1, with zero gradient).
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self, eps: float = 1e-12, outside: Literal["raise", "clamp"] = "raise", reduction: str = "mean"
    ) -> None:
        super().__init__(reduction)
        self.eps = check_number("lmse", "eps", eps, above=0)
        check_choice("lmse", "outside", outside, ("raise", "clamp"))
        self.outside = outside

    def elements(self, pred: Tensor, target: Tensor, timestep: Tensor | None) -> Tensor:
        """``-log(1 - r^2 + eps)``, in the form that keeps its digits at both ends."""
        error = pred - target
        if self.outside == "clamp":
            error = error.clamp(-1, 1)
        elif error.numel() and bool((error.abs() > 1).any()):
            raise LossplugError(
                f"an error of {float(error.detach().abs().max()):.3g} is outside [-1, 1]",
                where="lmse",
                remedy="Scale data and predictions to [0, 1], or set outside='clamp'",
            )
        size = error.abs()
        near = size < 0.5
        small = torch.where(near, error, 0)
        # Near 1, eps would vanish beside r^2; near 0, 1 - r^2 would lose r.
        far = torch.where(near, 0.5, (1 - size) * (1 + size) + self.eps).log()
        return -torch.where(near, torch.log1p(self.eps - small * small), far)
