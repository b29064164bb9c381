"""Which places of a map look alike: affinities of pixels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.base import FeatureLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


def pixels(features: Tensor) -> Tensor:
    """Returns the channel vectors of a map [N, C, H, W] as [N, H W, C], each divided by its length + 1e-5."""
    flat = features.flatten(2).mT
    return flat / (torch.linalg.vector_norm(flat, dim=2, keepdim=True) + 1e-5)


@register(
    "loss",
    "faqd",
    family="distillation",
    paper="Feature Affinity Assisted Knowledge Distillation and Quantization of Deep Neural Networks",
    arxiv="2302.10899",
    signature="features_teacher",
)
class FAQD(FeatureLoss):
    r"""Feature affinity: the difference of :math:`A = F^\top F` [HW, HW] of normalised pixels of two maps.

    ``order`` 1: :math:`\|A_s - A_t\|_1/(HW)^2`; 2: :math:`\|A_s - A_t\|_F/(HW)`; mean over samples. With ``probes`` the
    affinities are never formed: they are multiplied by that many Gaussian vectors z, the same at every call;
    order 1 then is the mean over probes of :math:`\|(A_s - A_t) z\|_1/(HW)^2` (another number than without), order 2
    the root of the mean of :math:`\|(A_s - A_t) z\|_2^2`, whose expectation is the squared Frobenius norm. The
    student's map goes through a trained 1x1 convolution and ReLU (the release makes it but does not train it); the
    teacher's is resized to the student's side.

    Use it beside ``kd`` when the student is quantised: in its paper 0.1 per layer beside 1.0.

    Args:
        order: 1 or 2.
        probes: Number of vectors of the fast form, 15 in its code; None: the exact one.
        connector: Whether the student's map goes through the convolution.
        legacy_sum: The norm runs over the whole batch, and nothing is divided by N, as in the released code.
        seed: Of the vectors.
    """

    def __init__(
        self,
        order: Literal[1, 2] = 1,
        probes: int | None = None,
        connector: bool = True,
        legacy_sum: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if order not in (1, 2):
            raise LossplugError(f"order is {order!r}, allowed is 1 or 2", where="faqd")
        if probes is not None:
            check_number("faqd", "probes", probes, least=1)
        self.order, self.probes, self.connector = order, probes, connector
        self.legacy_sum, self.seed = legacy_sum, seed
        self.connectors = nn.ModuleDict()

    def build(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Makes the convolutions."""
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if self.connector and str(i) not in self.connectors:
                layer = nn.Sequential(nn.Conv2d(s.shape[1], t.shape[1], 1), nn.ReLU())
                self.connectors[str(i)] = layer.to(s.device)

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """The affinity loss of one pair of maps."""
        if student.ndim != 4 or teacher.ndim != 4:
            raise LossplugError(
                f"features {tuple(student.shape)} and {tuple(teacher.shape)}, expected maps [N, C, H, W]", where="faqd"
            )
        if self.connector:
            if str(position) not in self.connectors:
                raise LossplugError("has no connector yet", where="faqd", remedy="Call build() with the features first")
            student = self.connectors[str(position)](student.to(next(self.connectors.parameters()).dtype))
        if teacher.shape[2:] != student.shape[2:]:
            teacher = F.interpolate(teacher, student.shape[2:], mode="bilinear", align_corners=True)
        s, t = pixels(student), pixels(teacher.to(student))
        n, places = s.shape[:2]
        if self.probes is None:
            difference = s @ s.mT - t @ t.mT
        else:
            z = torch.randn(places, self.probes, generator=torch.Generator().manual_seed(self.seed)).to(s)
            difference = s @ (s.mT @ z) - t @ (t.mT @ z)
        k = 1 if self.probes is None else self.probes
        if self.order == 1:
            total = difference.abs().sum() / (k * places**2)
            return total if self.legacy_sum else total / n
        if self.legacy_sum:
            return torch.linalg.vector_norm(difference) / (k**0.5 * places)
        return torch.linalg.vector_norm(difference, dim=(1, 2)).mean() / (k**0.5 * places)
