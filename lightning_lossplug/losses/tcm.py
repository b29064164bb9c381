"""Threshold-consistent margin: an auxiliary hinge with absolute cosine margins."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.losses.embeddings import PairLoss, Pairs, check_range
from lightning_lossplug.losses.ranks import sum_ranks, world_size
from lightning_lossplug.registry import register


@register(
    "loss",
    "tcm",
    family="metric",
    paper="Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
    arxiv="2307.04047",
    signature="embeddings_labels",
    gather=True,
)
class TCM(PairLoss):
    r"""Threshold-consistent margin (arXiv 2307.04047), to be added to a base metric loss.

    When: one similarity threshold has to fit all classes. Each hinge is averaged over its violators only:
    :math:`\lambda_p\, \mathrm{mean}_{s_p \le m_p}(m_p - s_p) + \lambda_n\, \mathrm{mean}_{s_n \ge m_n}(s_n - m_n)`;
    a term without violators is 0. The value therefore jumps when a pair crosses its margin.

    Shapes: x [B, D], y [B] (see :class:`~lightning_lossplug.losses.embeddings.PairLoss`). Always a scalar.

    Args:
        margin_pos: :math:`m_p`, with -1 <= margin_neg < margin_pos <= 1.
        margin_neg: :math:`m_n`.
        lambda_pos: :math:`\lambda_p \ge 0`.
        lambda_neg: :math:`\lambda_n \ge 0`.
        normalize: L2-normalise x inside.
        gather: Pairs reach over the batches of all ranks.
    """

    def __init__(
        self,
        margin_pos: float = 0.9,
        margin_neg: float = 0.5,
        lambda_pos: float = 1.0,
        lambda_neg: float = 1.0,
        normalize: bool = True,
        gather: bool = False,
    ) -> None:
        super().__init__(normalize, gather)
        check_range("tcm", "margin_pos", margin_pos, "(margin_neg, 1]", margin_neg < margin_pos <= 1)
        check_range("tcm", "margin_neg", margin_neg, "[-1, margin_pos)", margin_neg >= -1)
        check_range("tcm", "lambda_pos", lambda_pos, ">= 0", lambda_pos >= 0)
        check_range("tcm", "lambda_neg", lambda_neg, ">= 0", lambda_neg >= 0)
        self.margin_pos, self.margin_neg = margin_pos, margin_neg
        self.lambda_pos, self.lambda_neg = lambda_pos, lambda_neg

    def pair_loss(self, pairs: Pairs) -> Tensor:
        """Mean violation of either side."""
        s = pairs.similarity
        pull = self.violation(self.margin_pos - s, pairs.positive)
        push = self.violation(s - self.margin_neg, pairs.negative)
        loss = self.lambda_pos * pull + self.lambda_neg * push
        return loss + pairs.candidates.sum() * 0 if s.numel() == 0 else loss

    def violation(self, excess: Tensor, mask: Tensor) -> Tensor:
        """Returns the mean of ``excess`` over the pairs of ``mask`` where it is not negative."""
        violated = mask & (excess >= 0)
        count = sum_ranks(self.gather, violated.sum().to(excess)) / world_size(self.gather)
        return torch.where(violated, excess, 0).sum() / torch.where(count > 0, count, 1)
