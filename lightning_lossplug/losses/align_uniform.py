"""Alignment and uniformity on the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lossplug.losses.embeddings import EmbeddingLoss, check_range, full_precision, masked_logsumexp
from lightning_lossplug.losses.ranks import gather_rows, logsumexp_ranks
from lightning_lossplug.registry import register


@register(
    "loss",
    "align_uniform",
    family="metric",
    paper="Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
    arxiv="2005.10242",
    signature="paired_embeddings",
    gather=True,
)
class AlignUniform(EmbeddingLoss):
    r"""Alignment of positives plus uniformity of each view (arXiv 2005.10242), the two aims of contrastive losses.

    :math:`\mathrm{mean} |a_i - b_i|^\alpha + \frac{\lambda}{2} (U(a) + U(b))` with
    :math:`U(x) = \log \mathrm{mean}_{i<j}\, e^{-t |x_i - x_j|^2}`. For :math:`\alpha < 2` the squared distance carries
    1e-12, so that equal views have a gradient. One sample has no pairs: its uniformity is 0.

    When: self-supervised pre-training, or to measure what another contrastive loss reaches.

    Shapes: a, b [B, D]. Always a scalar.

    Args:
        alpha: :math:`\alpha > 0`.
        t: :math:`t > 0`.
        lam: :math:`\lambda \ge 0`.
        normalize: L2-normalise inside.
        gather: Pairs reach over the batches of all ranks.
    """

    def __init__(
        self, alpha: float = 2.0, t: float = 2.0, lam: float = 1.0, normalize: bool = True, gather: bool = False
    ) -> None:
        super().__init__(normalize, gather)
        check_range("align_uniform", "alpha", alpha, "> 0", alpha > 0)
        check_range("align_uniform", "t", t, "> 0", t > 0)
        check_range("align_uniform", "lam", lam, ">= 0", lam >= 0)
        self.alpha, self.t, self.lam = alpha, t, lam

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the loss of two views ``a``, ``b`` [B, D]."""
        with full_precision(a):
            a, b = self.embed_pair(a, b)
            (all_a, all_b), start = gather_rows(self.gather, a, b)
            squared = (a - b).square().sum(dim=1)
            align = squared if self.alpha == 2 else (squared + (1e-12 if self.alpha < 2 else 0)) ** (self.alpha / 2)
            uniform = self.uniform(a, all_a, start) + self.uniform(b, all_b, start)
            return self.reduce(align, None, torch.cat([all_a, all_b])) + self.lam / 2 * uniform

    def uniform(self, x: Tensor, all_x: Tensor, start: int) -> Tensor:
        """Returns the log of the mean Gaussian potential over pairs of different rows."""
        total = all_x.shape[0]
        if total < 2:
            return all_x.sum() * 0
        own = torch.arange(start, start + x.shape[0], device=x.device)
        others = own[:, None] != torch.arange(total, device=x.device)
        squared = x.square().sum(dim=1)[:, None] + all_x.square().sum(dim=1) - 2 * x @ all_x.T
        potential = masked_logsumexp((-self.t * squared).reshape(-1), others.reshape(-1))
        return logsumexp_ranks(self.gather, potential) - math.log(total * (total - 1))
