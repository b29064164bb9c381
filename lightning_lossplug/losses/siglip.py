"""Sigmoid loss of language-image pre-training: every pair is a binary problem of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lossplug.losses.embeddings import EmbeddingLoss, check_range, full_precision
from lightning_lossplug.losses.ranks import gather_rows
from lightning_lossplug.registry import register


@register(
    "loss",
    "siglip",
    family="metric",
    paper="Sigmoid Loss for Language Image Pre-Training",
    arxiv="2303.15343",
    signature="paired_embeddings",
    gather=True,
    stateful=True,
    no_weight_decay=("logit_scale", "logit_bias"),
)
class SigLIP(EmbeddingLoss):
    r"""Pairwise sigmoid loss (arXiv 2303.15343), for two modalities; better than softmax at small batches.

    With :math:`X = t\, a b^T + c` and :math:`Z = 2I - 1`:
    :math:`l = -\frac1B \sum_{ij} \log \sigma(Z_{ij} X_{ij})`, over B rows, not B^2 pairs.

    Owns ``logit_scale`` (the logarithm of :math:`t`) and ``logit_bias`` (:math:`c`); keep both out of weight decay.

    Shapes: a, b [B, D]; ``none`` gives the sum of every row, [B].

    Args:
        logit_scale: Initial :math:`\log t`.
        logit_bias: Initial :math:`c`.
        learnable: Whether both are parameters. Turn it off where the model passes its own.
        row_tile: Form this many rows of the matrix at a time and recompute them in backward; None: all at once.
        normalize: L2-normalise inside.
        gather: The rows of b are those of all ranks; all but a rank's own are negatives.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(
        self,
        logit_scale: float = math.log(10),
        logit_bias: float = -10.0,
        learnable: bool = True,
        row_tile: int | None = None,
        normalize: bool = True,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(normalize, gather, reduction)
        if row_tile is not None:
            check_range("siglip", "row_tile", row_tile, ">= 1", row_tile >= 1)
        self.row_tile = row_tile
        for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
            if learnable:
                setattr(self, name, nn.Parameter(torch.tensor(float(value))))
            else:
                self.register_buffer(name, torch.tensor(float(value)))

    def forward(
        self, a: Tensor, b: Tensor, scale: Tensor | float | None = None, bias: Tensor | float | None = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            a: [B, D].
            b: [B, D].
            scale: :math:`t` itself, not its logarithm, instead of the module's.
            bias: :math:`c` instead of the module's.
        """
        with full_precision(a):
            a, b = self.embed_pair(a, b)
            t = torch.as_tensor(self.logit_scale.exp() if scale is None else scale).to(a)
            c = torch.as_tensor(self.logit_bias if bias is None else bias).to(a)
            (all_b,), start = gather_rows(self.gather, b)
            if self.row_tile is None or a.shape[0] <= self.row_tile:
                rows = row_sums(a, all_b, t, c, start)
            else:
                parts = a.split(self.row_tile)
                starts = range(start, start + a.shape[0], self.row_tile)
                rows = torch.cat(
                    [
                        checkpoint(row_sums, part, all_b, t, c, first, use_reentrant=False, preserve_rng_state=False)
                        for part, first in zip(parts, starts, strict=True)
                    ]
                )
            return self.reduce(rows, None, all_b)


def row_sums(a: Tensor, b: Tensor, t: Tensor, c: Tensor, start: int) -> Tensor:
    """Returns ``-sum_j log sigmoid(Z_ij X_ij)`` of rows whose partners are ``b[start:]``."""
    x = t * (a @ b.T) + c
    partner = torch.arange(start, start + a.shape[0], device=a.device)
    positive = partner[:, None] == torch.arange(b.shape[0], device=a.device)
    return -F.logsigmoid(torch.where(positive, x, -x)).sum(dim=1)
