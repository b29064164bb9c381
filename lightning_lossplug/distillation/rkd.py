"""Relations between samples: distances and angles of their embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import FeatureLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


def distances(e: Tensor) -> Tensor:
    """Returns Euclidean distances [N, N] of embeddings [N, D], divided by the mean of the positive ones."""
    square = e.square().sum(dim=1)
    d = (square[:, None] + square - 2 * e @ e.T).clamp(min=1e-12).sqrt()
    d = d * (1 - torch.eye(len(e), dtype=e.dtype, device=e.device))
    positive = d > 0
    return d / (d.sum() / positive.sum().clamp(min=1)).clamp(min=torch.finfo(d.dtype).tiny)


def angles(e: Tensor) -> Tensor:
    """Returns the cosines [N, N, N] of the angles at sample i between samples j and k."""
    apart = F.normalize(e[None] - e[:, None], dim=2)
    return apart @ apart.mT


@register(
    "loss",
    "rkd",
    family="distillation",
    paper="Relational Knowledge Distillation",
    arxiv="1904.05068",
    signature="features_teacher",
)
class RKD(FeatureLoss):
    r"""Relational distillation: smooth L1 between distances, and between angles, of all samples of the batch.

    :math:`25 \cdot \mathrm{mean}_{ij}\, l(d_s, d_t) + 50 \cdot \mathrm{mean}_{ijk}\, l(a_s, a_t)`; distances are
    divided by their mean, angles are cosines. Embeddings are flattened to [N, D]; the widths may differ. The angles
    take N^3 numbers: ``max_samples`` bounds N. Relations are those of this process's batch.

    Use it for embeddings, where no common classifier exists.

    Args:
        distance_weight: Weight >= 0 of the distances.
        angle_weight: Weight >= 0 of the angles.
        max_samples: The first so many samples of a batch make triples; None: all.
    """

    def __init__(
        self, distance_weight: float = 25.0, angle_weight: float = 50.0, max_samples: int | None = 128
    ) -> None:
        super().__init__()
        self.distance_weight = check_number("rkd", "distance_weight", distance_weight, least=0)
        self.angle_weight = check_number("rkd", "angle_weight", angle_weight, least=0)
        if max_samples is not None:
            check_number("rkd", "max_samples", max_samples, least=2)
        self.max_samples = max_samples

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """Both parts of one pair of embeddings."""
        s, t = student.flatten(1), teacher.flatten(1)
        if len(s) != len(t):
            raise LossplugError(f"{len(s)} samples of the student, {len(t)} of the teacher", where="rkd")
        value = s.sum() * 0
        if self.distance_weight:
            value = value + self.distance_weight * F.smooth_l1_loss(distances(s), distances(t))
        if self.angle_weight:
            n = self.max_samples
            value = value + self.angle_weight * F.smooth_l1_loss(angles(s[:n]), angles(t[:n]))
        return value
