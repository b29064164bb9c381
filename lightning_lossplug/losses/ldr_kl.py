"""LDR-KL: the worst case over label distributions near uniform."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.losses.base import ClassificationLoss, check_parameter
from lightning_lossplug.registry import register

Normalize = Literal["none", "l1", "softplus_l1"]


def normalize_scores(z: Tensor, normalize: str) -> Tensor:
    """Returns scores with mean absolute value 1: of ``z`` (``l1``) or of ``softplus(z)``; ``none`` leaves them."""
    if normalize == "none":
        return z
    f = F.softplus(z) if normalize == "softplus_l1" else z
    return f / f.abs().mean(dim=1, keepdim=True).clamp_min(1e-12)


def margin_differences(f: Tensor, y: Tensor, margin: float) -> Tensor:
    """Returns ``d_k = f_k - f_y + margin`` [R, C], with ``d_y = 0``."""
    y = y[:, None]
    d = f - f.gather(1, y) + margin
    return d.scatter(1, y, 0.0)


def ldr_kl(d: Tensor, lambda_: float | Tensor) -> Tensor:
    r"""Returns :math:`\lambda \log \frac1C \sum_k e^{d_k / \lambda}` of ``d`` [R, C]; lambda is a number or [R]."""
    scale = lambda_[:, None] if isinstance(lambda_, Tensor) else lambda_
    return lambda_ * ((d / scale).logsumexp(dim=1) - math.log(d.shape[1]))


@register(
    "loss",
    "ldr_kl",
    family="classification",
    paper="Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity",
    arxiv="2112.14869",
    signature="logits_index",
)
class LDRKL(ClassificationLoss):
    r"""LDR-KL loss (arXiv 2112.14869): :math:`l = \lambda \log \frac1C \sum_k e^{d_k/\lambda}`.

    :math:`d_k = f_k - f_y + c` for k other than y, :math:`d_y = 0`, over the scores ``f``. It is the largest expected
    ``d`` over label distributions, less lambda times their divergence from uniform: lambda -> 0 gives the largest
    difference (Crammer-Singer), lambda -> inf their mean, and ``lambda = 1, c = 0`` cross-entropy less ``log C``, so
    the value may be negative. It has no form in the statistics of a row: the margin scales the rounding error of the
    log-partition by ``exp(c / lambda)``.

    When: wrong labels, with lambda above 1 for more of them.

    Args:
        lambda_: Temperature > 0.
        margin: c >= 0; the official experiments take 0.1 on normalised scores and tune it.
        normalize: ``none``; or ``softplus_l1``, as in the official training: ``softplus(z)`` divided by its mean over
            the classes; or ``l1``: ``z`` divided by its mean absolute value. Lambda and margin then don't depend on the
            scale of the logits.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        lambda_: float = 1.0,
        margin: float = 0.1,
        normalize: str = "none",
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(lambda_ > 0, "ldr_kl", "lambda", lambda_, "> 0")
        check_parameter(margin >= 0, "ldr_kl", "margin", margin, ">= 0")
        check_parameter(normalize in get_args(Normalize), "ldr_kl", "normalize", normalize, "none, l1 or softplus_l1")
        self.lambda_, self.margin, self.normalize = lambda_, margin, normalize

    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """Rows from the differences to the target's score."""
        return ldr_kl(margin_differences(normalize_scores(z, self.normalize), y, self.margin), self.lambda_)
