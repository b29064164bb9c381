"""Barlow Twins: the cross-correlation of two views should be the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.losses.embeddings import EmbeddingLoss, check_range, full_precision
from lightning_lossplug.losses.ranks import sum_ranks
from lightning_lossplug.registry import register


@register(
    "loss",
    "barlow_twins",
    family="metric",
    paper="Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
    arxiv="2103.03230",
    signature="paired_embeddings",
    gather=True,
)
class BarlowTwins(EmbeddingLoss):
    r"""Redundancy reduction between two views (arXiv 2103.03230): pre-training without negatives.

    Both views are standardised per dimension over the batch (biased variance, eps 1e-5), :math:`C = Z_a^T Z_b / B`,
    :math:`l = \sum_i (C_{ii} - 1)^2 + \lambda \sum_{i \ne j} C_{ij}^2`.

    When: self-supervised pre-training with wide projections and batches of a few hundred.

    Shapes: a, b [B, D], not L2-normalised. Always a scalar.

    Args:
        lambd: :math:`\lambda > 0`.
        gather: Mean, variance and correlation over the batches of all ranks.
    """

    def __init__(self, lambd: float = 0.0051, gather: bool = False) -> None:
        super().__init__(normalize=False, gather=gather)
        check_range("barlow_twins", "lambd", lambd, "> 0", lambd > 0)
        self.lambd = lambd

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the loss of two views ``a``, ``b`` [B, D]."""
        with full_precision(a):
            z = torch.stack(self.embed_pair(a, b))
            total = sum_ranks(self.gather, torch.tensor(float(z.shape[1]), dtype=z.dtype, device=z.device))
            rows = total.clamp_min(1)
            z = z - sum_ranks(self.gather, z.sum(dim=1, keepdim=True)) / rows
            variance = sum_ranks(self.gather, z.square().sum(dim=1, keepdim=True)) / rows
            z = z * (variance + 1e-5).rsqrt()
            correlation = sum_ranks(self.gather, z[0].T @ z[1]) / rows
            diagonal = correlation.diagonal()
            off = correlation.square().sum() - diagonal.square().sum()
            loss = (diagonal - 1).square().sum() + self.lambd * off
            return torch.where(total > 0, loss, loss * 0)  # without a row: 0, on the graph
