"""Features of all stages, fused from the deepest to the shallowest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.base import FeatureLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register


def hierarchical_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean squared difference of maps [N, C, H, W] at full size and averaged to 4, 2 and 1 a side.

    The weights are 1, 1/2, 1/4, 1/8 over their sum; sizes that are not below H are left out.
    """
    value, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side >= student.shape[2]:
            continue
        weight /= 2
        small, other = F.adaptive_avg_pool2d(student, side), F.adaptive_avg_pool2d(teacher, side)
        value, total = value + weight * F.mse_loss(small, other), total + weight
    return value / total


class Fusion(nn.Module):
    """One stage: the student's features, mixed with what came from the deeper stage, in the teacher's channels.

    Args:
        student: Channels of the student's features.
        middle: Channels in between.
        teacher: Channels of the teacher's features.
        fuse: Whether there is a deeper stage.
    """

    def __init__(self, student: int, middle: int, teacher: int, fuse: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(student, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None
        self.widen = nn.Sequential(nn.Conv2d(middle, teacher, 3, padding=1, bias=False), nn.BatchNorm2d(teacher))

    def forward(self, features: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns what is compared with the teacher, and what goes on to the next stage."""
        x = self.narrow(features)
        if self.attention is not None and deeper is not None:
            y = F.interpolate(deeper, x.shape[2:], mode="nearest")
            share = self.attention(torch.cat([x, y], dim=1))
            x = x * share[:, :1] + y * share[:, 1:]
        return self.widen(x), x


@register(
    "loss",
    "reviewkd",
    family="distillation",
    paper="Distilling Knowledge via Knowledge Review",
    arxiv="2104.09044",
    signature="features_teacher",
)
class ReviewKD(FeatureLoss):
    """Knowledge review: every stage of the teacher teaches that stage of the student and all deeper ones.

    The student's features are fused from the deepest stage up (1x1 convolution, nearest upsampling, an attention over
    the two sources, 3x3 convolution) and compared by :func:`hierarchical_distance`, summed over stages. The fusion
    modules are made at the first call from the shapes, and trained. Weighed 1 to 8 in the paper, warmed up over 20
    epochs (a schedule of the weight).

    Use it with the outputs of all stages of two convolutional networks, shallow to deep.

    Args:
        middle_channels: Channels of the fused features; None: those of the student's deepest stage, at most 512.
    """

    def __init__(self, middle_channels: int | None = None) -> None:
        super().__init__()
        if middle_channels is not None:
            check_number("reviewkd", "middle_channels", middle_channels, least=1)
        self.middle_channels = middle_channels
        self.fusions = nn.ModuleList()

    def build(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Makes the fusion modules, deepest first."""
        if len(self.fusions):
            return
        for s, t in zip(student, teacher, strict=True):
            if s.ndim != 4 or t.ndim != 4:
                raise LossplugError(f"features {tuple(s.shape)}, expected maps [N, C, H, W]", where="reviewkd")
        middle = self.middle_channels or min(512, student[-1].shape[1])
        for i, (s, t) in enumerate(zip(reversed(student), reversed(teacher), strict=True)):
            self.fusions.append(Fusion(s.shape[1], middle, t.shape[1], fuse=i > 0).to(s.device))

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """The distance of one fused stage."""
        if student.shape[2:] != teacher.shape[2:]:
            student = F.interpolate(student, teacher.shape[2:], mode="nearest")
        return hierarchical_distance(student, teacher)

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """Computes the loss of all stages, shallow to deep.

        Raises:
            LossplugError: Different numbers of features, or :meth:`build` was not called with them.
        """
        ours = [student] if isinstance(student, Tensor) else list(student)
        if len(ours) != len(self.fusions):
            raise LossplugError(
                f"{len(ours)} features for {len(self.fusions)} fusion modules", where="reviewkd", remedy="Call build()"
            )
        with torch.autocast(ours[0].device.type, enabled=False):
            deeper, fused = None, []
            for fusion, features in zip(self.fusions, reversed(ours), strict=True):
                out, deeper = fusion(upcast(features), deeper)
                fused.append(out)
        return super().forward(fused[::-1], teacher)
