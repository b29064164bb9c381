"""Classification heads on the sphere: cosines to class weights, a margin on the labelled one, cross-entropy."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import check_labels
from lightning_lossplug.losses.embeddings import (
    EmbeddingLoss,
    check_embeddings,
    check_range,
    check_sample_labels,
    full_precision,
    l2_normalize,
    upcast,
)

ACOS_EPS = 1e-7  # the slope of acos at 1 is infinite; at 1 - 1e-7 it is 2236


def angular_margin(cosine: Tensor, margin: Tensor | float) -> Tensor:
    r"""Returns :math:`\cos(\theta + m)` while it falls with :math:`\theta`.

    Past :math:`\theta + m = \pi` that would rise again; there it is :math:`\cos\theta - m \sin m`.
    """
    theta = cosine.clamp(-1 + ACOS_EPS, 1 - ACOS_EPS).acos()
    sine = margin.sin() if isinstance(margin, Tensor) else math.sin(margin)
    return torch.where(theta + margin <= math.pi, (theta + margin).cos(), cosine - margin * sine)


class MarginHead(EmbeddingLoss):
    """Cross-entropy of scaled cosines between embeddings and owned class weights, the labelled one with a margin.

    The head is part of the loss: its ``weight`` [C, D] has to reach the optimizer (weight decay on it is intended).
    Embeddings are not to be normalised before.

    Args:
        num_classes: C.
        embedding_size: D.
        s: Scale of the cosines, > 0.
        gather: See the loss.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    cosine_limit: ClassVar[float] = 1.0  # cosines are clipped to [-limit, limit]

    def __init__(
        self, num_classes: int, embedding_size: int, s: float = 64.0, gather: bool = False, reduction: str = "mean"
    ) -> None:
        super().__init__(normalize=True, gather=gather, reduction=reduction)
        where = type(self).__name__
        check_range(where, "num_classes", num_classes, ">= 1", num_classes >= 1)
        check_range(where, "embedding_size", embedding_size, ">= 1", embedding_size >= 1)
        check_range(where, "s", s, "> 0", s > 0)
        self.num_classes, self.embedding_size, self.s = num_classes, embedding_size, s
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, embedding_size), dim=1))

    @abstractmethod
    def target_cosine(self, cosine: Tensor, norm: Tensor) -> Tensor:
        """Returns the labelled cosines [B] made harder; ``norm`` [B] are the lengths of the embeddings, detached."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the loss of unnormalised embeddings ``x`` [B, D] with class indices ``y`` [B].

        Raises:
            LabelError: A label outside [0, C) (checked on CPU).
            LossplugError: Shapes or dtypes that don't fit.
        """
        where = type(self).__name__
        check_embeddings(x, where, "x")
        check_sample_labels(y, x, where, "y")
        if x.shape[1] != self.embedding_size:
            raise LossplugError(f"x has width {x.shape[1]}, the head expects {self.embedding_size}", where=where)
        check_labels(y, self.num_classes, 0, where)  # 0 is a class: nothing is ignored
        with full_precision(x):
            x = upcast(x)
            cosine = l2_normalize(x) @ l2_normalize(self.weight.to(x)).T
            cosine = cosine.clamp(-self.cosine_limit, self.cosine_limit)
            column = y.long()[:, None]
            norm = torch.linalg.vector_norm(x.detach(), dim=1)
            hard = self.target_cosine(cosine.gather(1, column).squeeze(1), norm)
            logits = self.s * cosine.scatter(1, column, hard[:, None])
            return self.reduce(F.cross_entropy(logits, y.long(), reduction="none"), None, x)
