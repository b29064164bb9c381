"""Circle loss: every pair is pulled as hard as it is far from its optimum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.losses.embeddings import PairLoss, Pairs, check_range, masked_logsumexp
from lightning_lossplug.registry import register


@register(
    "loss",
    "circle",
    family="metric",
    paper="Circle Loss: A Unified Perspective of Pair Similarity Optimization",
    arxiv="2002.10857",
    signature="embeddings_labels",
    gather=True,
)
class Circle(PairLoss):
    r"""Circle loss over pairs (arXiv 2002.10857), for retrieval and re-identification with class labels.

    Per anchor, with :math:`a_p = [1+m-s_p]_+` and :math:`a_n = [s_n+m]_+` taken as constants in backward:
    :math:`l = \mathrm{softplus}(\mathrm{LSE}_n(\gamma a_n (s_n - m)) + \mathrm{LSE}_p(-\gamma a_p (s_p - 1 + m)))`.
    The mean is over anchors that have both a positive and a negative.

    Shapes: x [B, D], y [B] (see :class:`~lightning_lossplug.losses.embeddings.PairLoss`).

    Args:
        margin: :math:`m` in (0, 1): 0.25 for faces, 0.4 for retrieval.
        gamma: :math:`\gamma > 0`: 256 for faces, 128 for re-identification, 80 for retrieval.
        normalize: L2-normalise x inside.
        gather: Candidates are the batches of all ranks.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        margin: float = 0.4,
        gamma: float = 80.0,
        normalize: bool = True,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(normalize, gather, reduction)
        check_range("circle", "margin", margin, "(0, 1)", 0 < margin < 1)
        check_range("circle", "gamma", gamma, "> 0", gamma > 0)
        self.margin, self.gamma = margin, gamma

    def pair_loss(self, pairs: Pairs) -> Tensor:
        """Softplus of the summed log-sums over negatives and positives."""
        s, m = pairs.similarity, self.margin
        pull = -self.gamma * F.relu(1 + m - s.detach()) * (s - 1 + m)
        push = self.gamma * F.relu(s.detach() + m) * (s - m)
        both = pairs.positive.any(dim=1) & pairs.negative.any(dim=1)
        exponent = masked_logsumexp(push, pairs.negative) + masked_logsumexp(pull, pairs.positive)
        # torch's softplus is cut off at 20, good to 2e-9 only
        rows = -F.logsigmoid(-torch.where(both, exponent, 0))
        return self.reduce(rows, both, pairs.candidates)
