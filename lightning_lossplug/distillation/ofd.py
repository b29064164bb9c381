"""Features before their ReLU, the teacher's cut at a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_lossplug.distillation.base import FeatureLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


def negative_margin(mean: Tensor, std: Tensor) -> Tensor:
    r"""Returns the expected negative value [C] of normally distributed channels.

    :math:`E[x \mid x < 0] = \mu - \sigma\,\phi(\mu/\sigma)/\Phi(-\mu/\sigma)`; where less than 0.001 of the mass is
    negative, :math:`-3\sigma`.

    Args:
        mean: Of each channel: the bias of a batch norm.
        std: Of each channel, > 0: the absolute scale of a batch norm.
    """
    mu, sigma = mean.double(), std.double().clamp(min=1e-12)
    ratio = mu / sigma
    below = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    margin = mu - sigma * density / below.clamp(min=1e-3)
    return torch.where(below > 1e-3, margin, -3 * sigma).to(mean)


@register(
    "loss",
    "ofd",
    family="distillation",
    paper="A Comprehensive Overhaul of Feature Distillation",
    arxiv="1904.01866",
    signature="features_teacher",
)
class OFD(FeatureLoss):
    r"""Overhaul of feature distillation: a partial squared distance before the ReLU.

    The teacher's map is cut from below at a margin per channel, :math:`t = \max(f_t, m)`; the student's goes through a
    trained 1x1 convolution and batch norm. No penalty where :math:`s \le t \le 0` (the ReLU makes both 0). Sum over
    entries, mean over the batch, layer l of L weighed :math:`2^{-(L-1-l)}`, all times ``scale``.

    In ``Distillation`` name the teacher's batch norms in front of its ReLUs: the margins are read from them
    (:func:`negative_margin`). Elsewhere give ``margins``, or leave them out to cut at ``-inf``: nowhere.

    Use it with the last map of every stage of two convolutional networks.

    Args:
        scale: Factor >= 0 of the sum.
        margins: One tensor [C] per layer, in the order of the features.
    """

    def __init__(self, scale: float = 1e-3, margins: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.scale = check_number("ofd", "scale", scale, least=0)
        self.margins = None if margins is None else [m.detach() for m in margins]
        self.connectors = nn.ModuleDict()
        self._layers = 1

    def read_teacher(self, modules: Sequence[nn.Module]) -> None:
        """Takes the margins from the teacher's batch norms.

        Raises:
            LossplugError: One of the modules is no batch norm.
        """
        if self.margins is not None:
            return
        for module in modules:
            if not isinstance(module, nn.BatchNorm2d) or module.weight is None:
                raise LossplugError(
                    f"{type(module).__name__} is no batch norm to read a margin from",
                    where="ofd",
                    remedy="Name the teacher's batch norms in front of its ReLUs, or give margins",
                )
        self.margins = [negative_margin(m.bias.detach(), m.weight.detach().abs()) for m in modules]  # type: ignore[arg-type, operator]

    def build(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Makes the connectors."""
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if str(i) not in self.connectors:
                layers = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False), nn.BatchNorm2d(t.shape[1])
                self.connectors[str(i)] = nn.Sequential(*layers).to(s.device)

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """Computes the loss of all layers, shallow to deep."""
        self._layers = 1 if isinstance(student, Tensor) else len(student)
        return super().forward(student, teacher)

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """The weighed distance of one layer."""
        if str(position) in self.connectors:
            student = self.connectors[str(position)](student.to(next(self.connectors.parameters()).dtype))
        if student.shape != teacher.shape:
            raise LossplugError(
                f"features {tuple(student.shape)} and {tuple(teacher.shape)} differ",
                where="ofd",
                remedy="Choose layers with maps of one size, and call build() with them first",
            )
        teacher = teacher.to(student)
        if self.margins is not None:
            margin = self.margins[position].to(teacher)
            teacher = torch.maximum(teacher, margin.reshape(1, -1, *(1,) * (teacher.ndim - 2)))
        counts = (student > teacher) | (teacher > 0)
        distance = ((student - teacher).square() * counts).sum() / len(student)
        return self.scale * distance / 2 ** (self._layers - 1 - position)
