"""Maps of where a network looks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import FeatureLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """Returns the normalised attention [N, H W] of maps [N, C, H, W]: mean over channels of ``|f|^p``, length 1."""
    return F.normalize(features.abs().pow(p).mean(dim=1).flatten(1), dim=1, eps=1e-12)


@register(
    "loss",
    "at",
    family="distillation",
    paper="Paying More Attention to Attention: Improving CNNs via Attention Transfer",
    arxiv="1612.03928",
    aliases=("attention_transfer",),
    signature="features_teacher",
)
class AttentionTransfer(FeatureLoss):
    r"""Attention transfer: mean over samples and places of :math:`(Q_s - Q_t)^2`, summed over layers.

    :math:`Q(f) = v/\|v\|_2` of :math:`v = \mathrm{mean}_c |f_c|^p`. Channels may differ; the larger map is averaged
    down to the smaller. The benchmarks weigh it 1000.

    Use it on the outputs of the stages of two convolutional networks; it has nothing to train.

    Args:
        p: Exponent > 0.
    """

    def __init__(self, p: float = 2.0) -> None:
        super().__init__()
        self.p = check_number("at", "p", p, above=0)

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """Mean squared difference of two maps."""
        if student.ndim != 4 or teacher.ndim != 4:
            raise LossplugError(
                f"features {tuple(student.shape)} and {tuple(teacher.shape)}, expected maps [N, C, H, W]", where="at"
            )
        side = min(student.shape[2], teacher.shape[2])
        student, teacher = (F.adaptive_avg_pool2d(f, side) if f.shape[2] != side else f for f in (student, teacher))
        return (attention_map(student, self.p) - attention_map(teacher, self.p)).square().mean()
