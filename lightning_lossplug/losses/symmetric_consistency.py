"""Symmetric cross-entropy between a student and a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss, check_parameter, upcast
from lightning_lossplug.losses.reduction import check_reduction, reduce_rows
from lightning_lossplug.registry import register


@register(
    "loss",
    "symmetric_consistency",
    family="classification",
    paper="Robust Mean Teacher for Continual and Gradual Test-Time Adaptation",
    arxiv="2211.13081",
    signature="logits_pair",
    needs=("teacher",),
)
class SymmetricConsistency(Loss):
    r"""Consistency in both directions (arXiv 2211.13081).

    :math:`l = -(1-w) \sum_k t_k \log s_k - w \sum_k s_k \log t_k`, with ``s`` and ``t`` the softmax of student and
    teacher logits. The teacher is usually a moving average of the student (momentum 0.999); the paper averages the
    loss over a plain and an augmented view.

    When: test-time adaptation and self-training, where the teacher is sometimes wrong.

    Args:
        w: Weight of the reverse direction in [0, 1]; 0 is cross-entropy against the teacher.
        detach_teacher: Keep gradients from the teacher logits. The official code lets them through unless the teacher
            ran without gradients.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(self, w: float = 0.5, detach_teacher: bool = True, reduction: str = "mean") -> None:
        super().__init__(reduction)
        check_parameter(0 <= w <= 1, "symmetric_consistency", "w", w, "[0, 1]")
        self.w, self.detach_teacher = w, detach_teacher

    def forward(
        self,
        logits: Tensor,
        teacher: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: Student logits [N, C, *] (or [C]).
            teacher: Teacher logits of the same shape.
            sample_weight: Weight of each row [N, *].
            denominator: What ``mean`` divides by instead of the summed weights.
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        reduction = self.reduction if reduction is None else reduction
        check_reduction(reduction)
        if not (
            logits.is_floating_point() and teacher.is_floating_point() and logits.shape == teacher.shape and logits.ndim
        ):
            raise LossplugError(
                f"student {tuple(logits.shape)} {logits.dtype}, teacher {tuple(teacher.shape)} {teacher.dtype}",
                where="symmetric_consistency",
                remedy="Expected two floating logit tensors [N, C, *] of one shape",
            )
        with torch.autocast(logits.device.type, enabled=False):
            dim = min(1, logits.ndim - 1)
            z = upcast(logits)
            b = (teacher.detach() if self.detach_teacher else teacher).to(z.dtype)
            log_s, log_t = z.log_softmax(dim), b.log_softmax(dim)
            rows = -(1 - self.w) * (log_t.exp() * log_s).sum(dim) - self.w * (log_s.exp() * log_t).sum(dim)
            divisor = None
            if sample_weight is not None:
                if sample_weight.shape != rows.shape:
                    raise LossplugError(
                        f"sample_weight {tuple(sample_weight.shape)} for rows {tuple(rows.shape)}",
                        where="symmetric_consistency",
                    )
                rows, divisor = rows * sample_weight, sample_weight.to(rows).sum()
            return reduce_rows(rows, divisor, reduction, z, denominator)
