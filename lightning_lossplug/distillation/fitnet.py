"""Features of the student, through a regressor, against features of the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.base import FeatureLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register


def regressor(student: torch.Size, teacher: torch.Size) -> nn.Module:
    """Returns the module that brings student features to the shape of the teacher's (batch dimension included).

    Maps [N, C, H, W]: a stride-2 convolution where the student's side is twice as long, a transposed one where it is
    half as long, else a convolution with a kernel of the difference plus 1; then batch norm and ReLU. Other shapes
    [..., D]: a linear layer.

    Raises:
        LossplugError: Maps whose sides don't fit any of these.
    """
    if len(student) != len(teacher):
        raise LossplugError(f"features {tuple(student)} and {tuple(teacher)} have other ranks", where="fitnet")
    if len(student) != 4:
        if student[:-1] != teacher[:-1]:
            raise LossplugError(
                f"features {tuple(student)} and {tuple(teacher)} differ before the last axis", where="fitnet"
            )
        return nn.Linear(student[-1], teacher[-1])
    s, t, c, d = student[2], teacher[2], student[1], teacher[1]
    if s == 2 * t:
        layer: nn.Module = nn.Conv2d(c, d, 3, stride=2, padding=1)
    elif 2 * s == t:
        layer = nn.ConvTranspose2d(c, d, 4, stride=2, padding=1)
    elif s >= t:
        layer = nn.Conv2d(c, d, 1 + s - t)
    else:
        raise LossplugError(
            f"the student's map is {s} wide, the teacher's {t}: no regressor fits",
            where="fitnet",
            remedy="Choose layers with the same, double or half side",
        )
    return nn.Sequential(layer, nn.BatchNorm2d(d), nn.ReLU())


@register(
    "loss",
    "fitnet",
    family="distillation",
    paper="FitNets: Hints for Thin Deep Nets",
    arxiv="1412.6550",
    signature="features_teacher",
)
class FitNet(FeatureLoss):
    r"""Hints: mean over all entries of :math:`(r(f_s) - f_t)^2`, with a trainable regressor r where shapes differ.

    Regressors are made at the first call, from the shapes (see :func:`regressor`); equal shapes have none, unless
    ``always``. The benchmarks weigh it 100.

    Use it with one middle layer; capture both sides before, or both after, their activation.

    Args:
        always: A regressor between equal shapes too.
    """

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.always = always
        self.regressors = nn.ModuleDict()

    def build(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Makes the regressors of the pairs that have none yet."""
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if str(i) not in self.regressors and (self.always or s.shape != t.shape):
                self.regressors[str(i)] = regressor(s.shape, t.shape).to(s.device)

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """Mean squared difference."""
        if str(position) in self.regressors:
            student = self.regressors[str(position)](student.to(next(self.regressors.parameters()).dtype))
        if student.shape != teacher.shape:
            raise LossplugError(
                f"features {tuple(student.shape)} and {tuple(teacher.shape)} differ",
                where="fitnet",
                remedy="Call build() with them first",
            )
        return F.mse_loss(student, teacher.to(student))
