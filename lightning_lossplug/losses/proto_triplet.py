"""Triplet loss between a query, the prototype of its class and the nearest other prototype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.losses.embeddings import check_range
from lightning_lossplug.losses.episode import EpisodeLoss, distances
from lightning_lossplug.registry import register


@register(
    "loss",
    "proto_triplet",
    family="metric",
    paper="SuSana Distancia is all you need: Enforcing class separability in metric learning via two novel "
    "distance-based loss functions for few-shot image classification",
    arxiv="2305.09062",
    signature="embeddings_labels",
    gather=False,
)
class ProtoTriplet(EpisodeLoss):
    r"""Prototype triplet loss of a few-shot episode (arXiv 2305.09062).

    With prototypes :math:`c_k`, the class means of the support, and :math:`d(a, b) = \sqrt{|a-b|^2 + 10^{-6}}`:
    :math:`l_q = [d(q, c_y) - \min_{k \ne y} d(q, c_k) + m]_+`, mean over the queries whose class and at least one
    other class are in the support.

    When: few-shot episodes, beside cross-entropy over the prototypes.

    Shapes: queries x [Q, D], y [Q]; support ref_x [S, D], ref_y [S] (also prototypes, one row per class). Without a
    support the batch is its own.

    Args:
        margin: :math:`m \ge 0`.
        normalize: L2-normalise all embeddings inside; off, as published.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(self, margin: float = 0.5, normalize: bool = False, reduction: str = "mean") -> None:
        super().__init__(normalize, reduction=reduction)
        check_range("proto_triplet", "margin", margin, ">= 0", margin >= 0)
        self.margin = margin

    def episode_loss(self, x: Tensor, y: Tensor, ref_x: Tensor, ref_y: Tensor, own: bool) -> Tensor:
        """Hinge of each query."""
        if ref_x.shape[0] == 0:
            return self.reduce(x.sum(dim=1) * 0, torch.zeros_like(y, dtype=torch.bool), x)
        # One prototype per support row, that of its class: the same minima as one per class, without unique().
        member = (ref_y[:, None] == ref_y[None, :]).to(ref_x.dtype)
        d = distances(x, (member @ ref_x) / member.sum(dim=1, keepdim=True))
        same = y[:, None] == ref_y[None, :]
        counted = same.any(dim=1) & (~same).any(dim=1)
        mine = d.masked_fill(~same & counted[:, None], torch.inf).amin(dim=1)
        other = d.masked_fill(same & counted[:, None], torch.inf).amin(dim=1)
        return self.reduce(F.relu(mine - other + self.margin), counted, x)
