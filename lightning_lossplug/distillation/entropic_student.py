"""A student that sends few bits: features of the teacher rebuilt from a compressed one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_lossplug.distillation.base import FeatureLoss
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register


def bits(likelihoods: Tensor) -> Tensor:
    r"""Returns :math:`-\sum \log_2 p` of the likelihoods an entropy model gives its symbols."""
    p = upcast(likelihoods)
    return -p.clamp(min=1e-9).log().sum() / math.log(2)


@register(
    "loss",
    "entropic_student",
    family="distillation",
    paper="Supervised Compression for Resource-Constrained Edge Computing Systems",
    arxiv="2108.11898",
    signature="features_teacher_likelihoods",
)
class EntropicStudent(FeatureLoss):
    r"""First stage of the Entropic Student: squared errors of all stages plus :math:`\beta` times the bits sent.

    :math:`\sum_l \|s_l - t_l\|^2 + \beta\,\mathrm{bits}`, sums over batch and entries. The student's stem is an
    encoder, an entropy bottleneck with noise in training, and a decoder (CompressAI has them); ``likelihoods`` are the
    bottleneck's. In the second stage the encoder is frozen and ``kd`` at T = 1 with weight 0.5 trains the rest.

    Use it to split a network between a weak device and a server.

    Args:
        beta: Weight >= 0 of the bits, 0.01 to 2.56 in the paper; 0 compares features alone.
    """

    def __init__(self, beta: float = 0.16) -> None:
        super().__init__()
        self.beta = check_number("entropic_student", "beta", beta, least=0)

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """Summed squared difference."""
        return (student - teacher.to(student)).square().sum()

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        likelihoods: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of features of equal shapes, and of the likelihoods where there are any."""
        value = super().forward(student, teacher)
        return value if likelihoods is None or self.beta == 0 else value + self.beta * bits(likelihoods)
