"""Cosine contrastive loss of recommenders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.losses.embeddings import check_range
from lightning_lossplug.losses.score_sets import ScoreSetLoss
from lightning_lossplug.registry import register


@register(
    "loss",
    "ccl",
    family="metric",
    paper="SimpleX: A Simple and Strong Baseline for Collaborative Filtering",
    arxiv="2109.12613",
    signature="scores_sets",
    gather=False,
)
class CCL(ScoreSetLoss):
    r"""Cosine contrastive loss (arXiv 2109.12613), for recommendation with many sampled negatives.

    Over cosines, column 0 the positive and the others sampled negatives:
    :math:`l_i = [1 - s_{i0}]_+ + w\, \mathrm{mean}_n [s_{in} - m]_+`. With sets of positives the first term is their
    mean. Nothing is normalised inside; rows without positives are left out.

    Shapes: scores [B, 1 + n], or [B, L] with positives (see :meth:`ScoreSetLoss.forward`).

    Args:
        margin: :math:`m` in [-1, 1); tuned within 0.1 to 0.9 in the paper, 0 in the released code.
        negative_weight: :math:`w > 0`, 2 to 250; None: the number of negatives, that is, their sum.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(self, margin: float = 0.0, negative_weight: float | None = None, reduction: str = "mean") -> None:
        super().__init__(reduction)
        check_range("ccl", "margin", margin, "[-1, 1)", -1 <= margin < 1)
        if negative_weight is not None:
            check_range("ccl", "negative_weight", negative_weight, "> 0, or None", negative_weight > 0)
        self.margin, self.negative_weight = margin, negative_weight

    def rows(self, s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Pull of the positives and weighted push of the negatives."""
        count = positive.sum(dim=1)
        pull = torch.where(positive, F.relu(1 - s), 0).sum(dim=1) / count.clamp_min(1)
        push = torch.where(positive, 0, F.relu(s - self.margin)).sum(dim=1)
        if self.negative_weight is not None:
            push = push * self.negative_weight / (s.shape[1] - count).clamp_min(1)
        return pull + push, count > 0
