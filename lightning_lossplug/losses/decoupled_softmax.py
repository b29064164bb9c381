"""Decoupled softmax: the positives of a row don't compete with each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.losses.embeddings import check_range, masked_logsumexp
from lightning_lossplug.losses.score_sets import ScoreSetLoss
from lightning_lossplug.registry import register


@register(
    "loss",
    "decoupled_softmax",
    family="metric",
    paper="Dual-Encoders for Extreme Multi-Label Classification",
    arxiv="2310.10636",
    signature="scores_sets",
    gather=False,
)
class DecoupledSoftmax(ScoreSetLoss):
    r"""Softmax loss of each positive against the negatives only (arXiv 2310.10636), for multi-label retrieval.

    :math:`l_i = \frac{1}{|P_i|} \sum_{j \in P_i} [\log(e^{s_{ij}} + \sum_{k \notin P_i} e^{s_{ik}}) - s_{ij}]`.
    Rows without positives are left out and not counted.

    Shapes: scores [B, L]; positives see :meth:`ScoreSetLoss.forward`.

    Args:
        tau: The scores are divided by it, > 0; 1 for scores that are divided already, 0.05 for cosines.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(self, tau: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(reduction)
        check_range("decoupled_softmax", "tau", tau, "> 0", tau > 0)
        self.tau = tau

    def rows(self, s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the positives of each row."""
        s = s / self.tau
        gap = s - masked_logsumexp(s, ~positive)[:, None]
        used = positive & (~positive).any(dim=1, keepdim=True)  # without negatives the loss is 0
        terms = torch.where(used, -F.logsigmoid(gap), 0)
        count = positive.sum(dim=1)
        return terms.sum(dim=1) / count.clamp_min(1), count > 0
