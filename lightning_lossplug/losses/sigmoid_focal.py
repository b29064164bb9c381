"""Sigmoid focal loss, by torchvision."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.errors import require
from lightning_lossplug.losses.base import check_parameter
from lightning_lossplug.losses.binary import BinaryLoss
from lightning_lossplug.registry import register


@register(
    "loss",
    "sigmoid_focal",
    family="classification",
    paper="Focal Loss for Dense Object Detection",
    arxiv="1708.02002",
    signature="binary_logits",
)
class SigmoidFocal(BinaryLoss):
    r"""Sigmoid focal loss :math:`l = a_t (1-p_t)^\gamma\, \mathrm{BCE}` per element (arXiv 1708.02002).

    :math:`p_t = t s + (1-t)(1-s)` with ``s`` the sigmoid of the logit, :math:`a_t = t\alpha + (1-t)(1-\alpha)`.
    ``torchvision.ops.sigmoid_focal_loss`` (extra ``vision``) with this library's reductions, ignored elements and
    weights; detection divides by the number of positive anchors: pass it as ``denominator``.

    When: dense detection and multi-label problems with few positives.

    Args:
        alpha: Weight of the positives, up to 1; negative: no weights.
        gamma: Focusing exponent >= 0.
        ignore_index: Target of elements that are left out.
        reduction: ``none``, ``mean`` or ``sum`` (torchvision's own default is ``none``).

    Raises:
        LossplugError: A parameter out of range, or torchvision is not installed.
    """

    def __init__(
        self, alpha: float = 0.25, gamma: float = 2.0, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(ignore_index, reduction)
        check_parameter(alpha <= 1, "sigmoid_focal", "alpha", alpha, "at most 1; negative for no weights")
        check_parameter(gamma >= 0, "sigmoid_focal", "gamma", gamma, ">= 0")
        self.alpha, self.gamma = alpha, gamma
        self._focal = require("torchvision.ops", "vision", "sigmoid_focal").sigmoid_focal_loss

    def elements(self, s: Tensor, t: Tensor) -> Tensor:
        """Elements by torchvision."""
        if 0 < self.gamma < 1:
            # (1-p_t)^(gamma-1) is infinite at p_t = 1: stop where float32 still tells 1-p_t from 0, at l < 1e-6.
            s = torch.where(t == 1, s.clamp_max(14.0), torch.where(t == 0, s.clamp_min(-14.0), s))
        return self._focal(s, t, alpha=self.alpha, gamma=self.gamma, reduction="none")
