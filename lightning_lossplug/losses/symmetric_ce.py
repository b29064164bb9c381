"""Symmetric cross-entropy with labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.losses.base import FusableLoss, check_parameter
from lightning_lossplug.losses.normalised import LOG_ZERO
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register


@register(
    "loss",
    "symmetric_ce",
    family="classification",
    paper="Symmetric Cross Entropy for Robust Learning with Noisy Labels",
    arxiv="1908.06112",
    aliases=("sce",),
    signature="logits_index",
    fusable=True,
)
class SymmetricCE(FusableLoss):
    r"""Symmetric cross-entropy :math:`l = \alpha n - \beta A (1 - p_y)` (arXiv 1908.06112).

    Cross-entropy plus reverse cross-entropy, which doesn't follow labels the model thinks impossible.

    When: noisy labels, with little to tune.

    Args:
        alpha: Weight of cross-entropy, >= 0; (alpha, beta) = (0.1, 1.0) on CIFAR-10, (6.0, 0.1) on CIFAR-100.
        beta: Weight of the reverse part, >= 0.
        A: Stands for log 0, below 0; log 1e-4 in code.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        A: float = LOG_ZERO,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(alpha >= 0, "symmetric_ce", "alpha", alpha, ">= 0")
        check_parameter(beta >= 0, "symmetric_ce", "beta", beta, ">= 0")
        check_parameter(A < 0, "symmetric_ce", "A", A, "< 0")
        self.alpha, self.beta, self.A = alpha, beta, A

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the cross-entropy of each row."""
        return self.alpha * stats.nll + self.beta * self.A * torch.expm1(-stats.nll)
