"""Distillation between vocabularies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import DistillationLoss, check_temperature
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_floating, upcast
from lightning_lossplug.registry import register


@register(
    "loss",
    "uld",
    family="distillation",
    paper="Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    arxiv="2402.12030",
    signature="logits_teacher",
    any_vocabulary=True,
)
class ULD(DistillationLoss):
    r"""Universal logit distillation: :math:`\sum_v |p_{(v)} - q_{(v)}|` of sorted probabilities, per token.

    The smaller vocabulary is filled up with zeros; sequences are compared up to the shorter one. Invariant to the
    order of either vocabulary, in [0, 2]. Weighed 1.5 beside the cross-entropy in the example of the paper.

    Use it when teacher and student have different tokenizers.

    Args:
        student_temperature: T > 0 of the student.
        teacher_temperature: T > 0 of the teacher.
    """

    def __init__(self, student_temperature: float = 1.0, teacher_temperature: float = 1.0) -> None:
        super().__init__()
        self.student_temperature = check_temperature("uld", student_temperature, "student_temperature")
        self.teacher_temperature = check_temperature("uld", teacher_temperature, "teacher_temperature")

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss: the mean over samples of the mean over compared tokens.

        Args:
            student: Logits [B, L, V].
            teacher: Logits [B, L', V'].
            target: Not used; every loss of logits can be given one.
            mask: Tokens of the student to compare, bool [B, L]; the k-th kept one meets the teacher's k-th.
            teacher_mask: Tokens of the teacher, bool [B, L']; None: ``mask`` where the lengths are equal, else all.

        Raises:
            LossplugError: Shapes that don't fit.
        """
        check_floating("uld", student=student, teacher=teacher)
        if student.ndim != 3 or teacher.ndim != 3 or len(student) != len(teacher):
            raise LossplugError(
                f"logits {tuple(student.shape)} and {tuple(teacher.shape)}, expected [B, L, V] and [B, L', V']",
                where="uld",
            )
        if teacher_mask is None and student.shape[1] == teacher.shape[1]:
            teacher_mask = mask
        with torch.autocast(student.device.type, enabled=False):
            values = []
            for i in range(len(student)):
                z_s = student[i] if mask is None else student[i][mask[i]]
                z_t = teacher[i] if teacher_mask is None else teacher[i][teacher_mask[i]]
                n = min(len(z_s), len(z_t))
                if n:
                    values.append(self._apart(upcast(z_s[:n]), upcast(z_t[:n].detach())).mean())
            return torch.stack(values).mean() if values else student.sum() * 0

    def _apart(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        q = (z_s / self.student_temperature).softmax(dim=1).sort(dim=1, descending=True).values
        p = (z_t / self.teacher_temperature).softmax(dim=1).sort(dim=1, descending=True).values
        width = max(q.shape[1], p.shape[1])
        q, p = (F.pad(x, (0, width - x.shape[1])) for x in (q, p))
        return (p - q).abs().sum(dim=1)
