"""Base of the few-shot losses: a batch of queries against a support, Euclidean distances."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.embeddings import EmbeddingLoss, check_sample_labels, full_precision


def distances(a: Tensor, b: Tensor) -> Tensor:
    r"""Returns :math:`\sqrt{|a_i - b_j|^2 + 10^{-6}}`, [A, B]; its gradient at equal points is 0."""
    # Not through a matrix product: |a|^2 + |b|^2 - 2ab loses the small distances that decide the neighbours.
    d = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return (d * d + 1e-6).sqrt()


class EpisodeLoss(EmbeddingLoss):
    """A loss of queries ``x`` against targets ``ref_x``; without targets the batch is its own."""

    @abstractmethod
    def episode_loss(self, x: Tensor, y: Tensor, ref_x: Tensor, ref_y: Tensor, own: bool) -> Tensor:
        """Returns the loss of checked inputs; ``own``: the targets are the queries themselves."""

    def forward(self, x: Tensor, y: Tensor, ref_x: Tensor | None = None, ref_y: Tensor | None = None) -> Tensor:
        """Computes the loss.

        Args:
            x: Query embeddings [Q, D].
            y: Their integer labels [Q].
            ref_x: Support embeddings [S, D]; None: x.
            ref_y: Their labels [S].

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        where = type(self).__name__
        if (ref_x is None) != (ref_y is None):
            raise LossplugError("ref_x and ref_y go together, one of them is missing", where=where)
        with full_precision(x):
            rows = self.embed(x, "x")
            check_sample_labels(y, x, where, "y")
            if ref_x is None or ref_y is None:
                return self.episode_loss(rows, y, rows, y, True)
            targets = self.embed(ref_x, "ref_x").to(rows.dtype)
            check_sample_labels(ref_y, ref_x, where, "ref_y")
            if ref_x.shape[1] != x.shape[1]:
                raise LossplugError(f"ref_x has width {ref_x.shape[1]}, x has {x.shape[1]}", where=where)
            return self.episode_loss(rows, y, targets, ref_y, False)
