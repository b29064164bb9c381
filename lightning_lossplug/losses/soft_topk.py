"""Soft top-k: the positives should be among the k labels that a differentiable top-k picks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.embeddings import check_range
from lightning_lossplug.losses.score_sets import ScoreSetLoss
from lightning_lossplug.registry import register


class _Threshold(torch.autograd.Function):
    """The shift t [B, 1] with ``sum_j sigmoid(alpha (s_j + t)) = k``, by bisection; implicit gradient."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, k: Tensor, alpha: float) -> Tensor:
        # All sigmoids at or below k/L at the lower end, at or above it at the upper: a bracket for any k and L.
        offset = torch.logit(k / s.shape[1]) / alpha
        low, high = offset - s.amax(dim=1, keepdim=True), offset - s.amin(dim=1, keepdim=True)
        for _ in range(64 if s.dtype == torch.float64 else 40):
            middle = (low + high) / 2
            short = torch.sigmoid(alpha * (s + middle)).sum(dim=1, keepdim=True) < k
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        t = (low + high) / 2
        ctx.save_for_backward(s, t)
        ctx.alpha = alpha
        return t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        s, t = ctx.saved_tensors
        x = ctx.alpha * (s + t)
        # dt/ds_j = -v_j / sum v with v = p (1 - p); as a softmax it holds where every v underflows
        share = (F.logsigmoid(x) + F.logsigmoid(-x)).softmax(dim=1)
        return -grad * share, None, None


def soft_topk_logits(s: Tensor, k: Tensor | int, alpha: float) -> Tensor:
    r"""Returns the logits of the soft top-k membership of each row.

    Args:
        s: Scores [B, L], float32 or float64.
        k: Labels to pick, in (0, L); one number or [B].
        alpha: Sharpness > 0; towards infinity the membership is the exact top-k indicator.

    Returns:
        :math:`\alpha (s_{ij} + t_i)`, [B, L], whose sigmoids sum to k in every row.
    """
    k = torch.as_tensor(k, device=s.device).to(s).expand(s.shape[0])[:, None]
    return alpha * (s + _Threshold.apply(s, k, alpha))


@register(
    "loss",
    "soft_topk",
    family="metric",
    paper="Dual-Encoders for Extreme Multi-Label Classification",
    arxiv="2310.10636",
    signature="scores_sets",
    gather=False,
)
class SoftTopK(ScoreSetLoss):
    r"""Minus the log-membership of the positives in a soft top-k (arXiv 2310.10636), for precision at k.

    :math:`l_i = -\frac{1}{|P_i|} \sum_{j \in P_i} \log \sigma(\alpha (s_{ij} + t_i))`, where :math:`t_i` makes the
    sigmoids of the row sum to k. Rows without positives are left out and not counted; a row that is to pick all
    labels is 0.

    Shapes: scores [B, L]; positives see :meth:`ScoreSetLoss.forward`.

    Args:
        k: Labels to pick, 0 < k < L; None: as many as the row has positives.
        alpha: :math:`\alpha > 0`; 2 in the released settings.
        tau: The scores are divided by it, > 0; 1 for scores that are divided already, 0.05 for cosines.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(self, k: int | None = None, alpha: float = 2.0, tau: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(reduction)
        if k is not None:
            check_range("soft_topk", "k", k, "> 0", k > 0)
        check_range("soft_topk", "alpha", alpha, "> 0", alpha > 0)
        check_range("soft_topk", "tau", tau, "> 0", tau > 0)
        self.k, self.alpha, self.tau = k, alpha, tau

    def rows(self, s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the positives of each row."""
        labels = s.shape[1]
        if self.k is not None and self.k >= labels:
            raise LossplugError(f"k is {self.k}, allowed is below the {labels} labels", where="soft_topk")
        count = positive.sum(dim=1)
        k = count if self.k is None else torch.full_like(count, self.k)
        proper = (count > 0) & (k < labels)
        log_p = F.logsigmoid(soft_topk_logits(s / self.tau, torch.where(proper, k, 0.5), self.alpha))
        terms = torch.where(positive & proper[:, None], -log_p, 0)
        return terms.sum(dim=1) / count.clamp_min(1), count > 0
