"""Focal loss: easy rows weigh less."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import FusableLoss
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register


def one_minus_power(rest: Tensor, gamma: float) -> Tensor:
    """Returns ``rest^gamma`` for ``rest = 1 - p >= 0`` with finite gradients at 0 (for gamma < 1 by a floor)."""
    if gamma == 0:
        return torch.ones_like(rest)
    return rest.clamp_min(1e-12) ** gamma if gamma < 1 else rest**gamma


@register(
    "loss",
    "focal",
    family="classification",
    paper="Focal Loss for Dense Object Detection",
    arxiv="1708.02002",
    signature="logits_index",
    fusable=True,
)
class Focal(FusableLoss):
    r"""Softmax focal loss :math:`l = w_y (1-p_y)^\gamma (-\log p_y)` (arXiv 1708.02002).

    When: many easy rows drown the hard ones; it also lowers the confidence of a network that overfits.

    Args:
        gamma: Focusing exponent >= 0; 0 is cross-entropy.
        detach_modulator: Take :math:`(1-p_y)^\gamma` as a constant in backward, as several public implementations do;
            their gradient is not that of the published loss.
        weight: Class weights [C] (the paper's alpha).
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        detach_modulator: bool = False,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        if gamma < 0:
            raise LossplugError(f"gamma is {gamma}, allowed is >= 0", where="focal")
        self.gamma, self.detach_modulator = gamma, detach_modulator

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the cross-entropy of each row."""
        n = stats.nll
        modulator = one_minus_power(-torch.expm1(-n), self.gamma)
        return (modulator.detach() if self.detach_modulator else modulator) * n
