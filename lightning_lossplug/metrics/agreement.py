"""How often a student says what its teacher says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lossplug.errors import LossplugError


class TeacherAgreement(Metric):
    """Share of rows whose largest logit is the same class for student and teacher, in [0, 1].

    ``update(student, teacher, mask)`` takes logits [..., C] of one shape and, optionally, which rows to count.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    hits: Tensor
    total: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("hits", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> None:
        """Counts a batch.

        Raises:
            LossplugError: Shapes that differ.
        """
        rows = student.shape[:-1]
        if student.shape != teacher.shape or (mask is not None and mask.shape != rows):
            raise LossplugError(
                f"logits {tuple(student.shape)} and {tuple(teacher.shape)}"
                + ("" if mask is None else f" with a mask {tuple(mask.shape)}"),
                where="TeacherAgreement",
                remedy="Both need the same shape, the mask that of the rows",
            )
        same = student.argmax(dim=-1) == teacher.argmax(dim=-1)
        same = same if mask is None else same[mask.bool()]
        self.hits += same.sum()
        self.total += same.numel()

    def compute(self) -> Tensor:
        """Returns the share; NaN before the first update."""
        return self.hits.float() / self.total
