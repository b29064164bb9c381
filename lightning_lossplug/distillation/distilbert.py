"""Hidden states in the same direction."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import FeatureLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register


def spaced_layers(teacher: int, student: int) -> list[int]:
    """Returns which of the ``teacher`` layers start a student of ``student``: evenly spaced, first and last included.

    Raises:
        LossplugError: Not ``1 <= student <= teacher``.
    """
    if not 1 <= student <= teacher:
        raise LossplugError(f"{student} layers can't be taken from {teacher}")
    if student == 1:
        return [0]
    return [round(i * (teacher - 1) / (student - 1)) for i in range(student)]


@register(
    "loss",
    "hidden_cosine",
    family="distillation",
    paper="DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
    arxiv="1910.01108",
    aliases=("distilbert_cosine",),
    signature="features_teacher",
)
class HiddenCosine(FeatureLoss):
    r"""The cosine part of DistilBERT's triple loss: mean of :math:`1 - \cos(h_s, h_t)` over the last axis.

    With ``kd`` at T = 2 (weight 5) and the task loss (weight 2) it is the triple loss. The widths have to be equal.

    Use it when the student was started from the teacher's layers (:func:`spaced_layers`).
    """

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """Mean over all vectors."""
        if student.shape != teacher.shape:
            raise LossplugError(
                f"hidden states {tuple(student.shape)} and {tuple(teacher.shape)} differ",
                where="hidden_cosine",
                remedy="Use fitnet, which learns a map between widths",
            )
        return (1 - torch.cosine_similarity(student, teacher, dim=-1)).mean()
