"""Attention maps of named groups of layers, each with its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_lossplug.distillation.at import AttentionTransfer
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register

YOLO_GROUPS = {"backbone": (4, 1e6), "neck": (2, 1e3), "head": (3, 1e4)}


@register(
    "loss",
    "group_at",
    family="distillation",
    paper="Group channel pruning and spatial attention distilling for object detection",
    arxiv="2306.01526",
    signature="features_teacher",
)
class GroupAT(AttentionTransfer):
    """Attention transfer to a pruned network from the one it was: ``at`` of groups of layers, each group weighed.

    Pruning changes the channels, not the maps' places, so nothing has to be trained. The optional output term of the
    source (``kd`` at T = 3, weight 1e-3) is another loss beside it.

    Use it after structured pruning of a detector; the default is the source's for YOLOv4 (layers 7, 16, 37, 58; 78,
    106; 85, 92, 99).

    Args:
        groups: Name -> (number of features, weight >= 0), in the order of the features.
        p: Exponent > 0.
    """

    def __init__(self, groups: Mapping[str, tuple[int, float]] | None = None, p: float = 2.0) -> None:
        super().__init__(p)
        self.groups = dict(YOLO_GROUPS if groups is None else groups)
        self.weights: list[float] = []
        for name, (count, weight) in self.groups.items():
            check_number("group_at", f"the number of features of {name!r}", count, least=1)
            self.weights += [check_number("group_at", f"the weight of {name!r}", weight, least=0)] * count

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """The weighed difference of two maps."""
        return self.weights[position] * super().pair(student, teacher, position)

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """Computes the loss of all groups.

        Raises:
            LossplugError: Another number of features than the groups have.
        """
        given = 1 if isinstance(student, Tensor) else len(student)
        if given != len(self.weights):
            raise LossplugError(
                f"{given} features for groups of {len(self.weights)}", where="group_at", remedy="Give groups to fit"
            )
        return super().forward(student, teacher)
