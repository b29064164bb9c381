"""PolyLoss: cross-entropy or focal loss with perturbed leading polynomial coefficients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.losses.base import FusableLoss, check_parameter
from lightning_lossplug.losses.focal import one_minus_power
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register


def poly(n: Tensor, rest: Tensor, epsilon: Sequence[float], gamma: float = 0.0) -> Tensor:
    r"""Returns :math:`r^\gamma (n + \sum_j \epsilon_j r^j)` for the cross-entropy ``n`` and ``r = 1 - p_t``."""
    terms = torch.zeros_like(n)
    for coefficient in reversed(epsilon):
        terms = (terms + coefficient) * rest
    return one_minus_power(rest, gamma) * (n + terms)


@register(
    "loss",
    "poly_loss",
    family="classification",
    paper="PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions",
    arxiv="2204.12511",
    aliases=("poly",),
    signature="logits_index",
    soft=True,
    fusable=True,
)
class PolyLoss(FusableLoss):
    r"""Poly-1, Poly-N and PolyFocal (arXiv 2204.12511).

    Cross-entropy is the series :math:`\sum_j (1-p_t)^j / j`; PolyLoss shifts its first N coefficients:
    :math:`l = (1-p_t)^\gamma \big(n + \sum_{j=1}^N \epsilon_j (1-p_t)^j\big)`, ``n = -log p_y``. For soft or smoothed
    targets ``q``, ``n`` is the cross-entropy against ``q`` and :math:`p_t = \sum_k q_k p_k`.

    When: image classification, as a one-parameter gain over cross-entropy; the best epsilon depends on the task.

    Args:
        epsilon: :math:`\epsilon_1`, or the list :math:`\epsilon_1 ... \epsilon_N`. The paper takes 2.0 for
            EfficientNetV2 on ImageNet and -1.0 for detection with focal loss. Below -1/j a coefficient of the series
            turns negative, which is allowed with a warning.
        gamma: Exponent >= 0 of the focal factor; 0 is Poly-N, above it PolyFocal.
        label_smoothing: In [0, 1]: the target is mixed with the uniform distribution, in both terms.
        weight: Class weights [C]; they multiply the whole row.
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.

    Raises:
        LossplugError: ``gamma`` or ``label_smoothing`` out of range, or an empty list.
    """

    accepts_soft = True

    def __init__(
        self,
        epsilon: float | Sequence[float] = 1.0,
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        self.epsilon = tuple(epsilon) if isinstance(epsilon, Sequence) else (epsilon,)
        check_parameter(len(self.epsilon) > 0, "poly_loss", "epsilon", epsilon, "a number or a list of numbers")
        check_parameter(gamma >= 0, "poly_loss", "gamma", gamma, ">= 0")
        check_parameter(0 <= label_smoothing <= 1, "poly_loss", "label_smoothing", label_smoothing, "[0, 1]")
        for j, coefficient in enumerate(self.epsilon, start=1):
            if coefficient < -1 / j:
                warnings.warn(f"poly_loss: epsilon_{j} = {coefficient} makes coefficient {j} of the series negative")
        self.gamma, self.label_smoothing = gamma, label_smoothing
        self.needs = frozenset({"sum"}) if label_smoothing else frozenset()

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from ``n``; with smoothing ``p_t = (1-s) p_y + s/C``, as the probabilities sum to one."""
        n, s = stats.nll, self.label_smoothing
        rest = -torch.expm1(-n)
        if s:
            rest = (rest * (1 - s) + s * (1 - 1 / stats.classes)).clamp_min(0)
            n = (1 - s) * n + s * (stats.lse - stats.needed("sum") / stats.classes)
        return poly(n, rest, self.epsilon, self.gamma)

    def soft_rows(self, z: Tensor, q: Tensor) -> Tensor:
        """Rows against probabilities ``q``."""
        q = (1 - self.label_smoothing) * q + self.label_smoothing / z.shape[1]
        log_p = z.log_softmax(dim=1)
        rest = (1 - torch.linalg.vecdot(q, log_p.exp())).clamp_min(0)
        return poly(-torch.linalg.vecdot(q, log_p), rest, self.epsilon, self.gamma)
