"""A teacher whose mistakes are corrected by the label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import LogitLoss, check_temperature
from lightning_lossplug.distillation.divergences import log_probabilities
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


def corrected(p: Tensor, y: Tensor, threshold: float = 0.2) -> Tensor:
    r"""Returns distributions [R, C] in which the label leads the other classes by ``threshold``.

    Where the top class is another: :math:`(1 - m) p + m\,e_y` with
    :math:`m = (p_{max} - p_y + \theta)/(1 + p_{max} - p_y)`. Where it is the label: :math:`p_y` rises to
    :math:`\min(1, p_y + \theta)` and the others are scaled to the rest.
    """
    top, own = p.max(dim=1), p.gather(1, y[:, None]).squeeze(1)
    label = F.one_hot(y, p.shape[1]).to(p)
    wrong = top.indices != y
    share = (top.values - own + threshold) / (1 + top.values - own + 1e-7)
    raised = (own + threshold).clamp(max=1)
    right = (raised - own) / (1 - own).clamp(min=torch.finfo(p.dtype).eps)
    mix = torch.where(wrong, share, right).clamp(0, 1)[:, None]
    return (1 - mix) * p + mix * label


@register(
    "loss",
    "mft",
    family="distillation",
    paper="Minifinetuning: Low-Data Generation Domain Adaptation through Corrective Self-Distillation",
    arxiv="2506.15702",
    signature="logits_teacher_index",
)
class MFT(LogitLoss):
    r"""Minifinetuning: :math:`T^2 KL(\tilde p \| q)` to a teacher corrected by the labels (:func:`corrected`).

    Use it to adapt a model to little text with itself, before the adaptation, as the teacher.

    Args:
        threshold: By how much the label leads, in [0, 1].
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    needs_target = True

    def __init__(
        self,
        threshold: float = 0.2,
        temperature: float = 1.0,
        t2_scale: bool = True,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        self.threshold = check_number("mft", "threshold", threshold, least=0, most=1)
        self.temperature, self.t2_scale = check_temperature("mft", temperature), t2_scale

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row divergences."""
        assert y is not None
        p = corrected(log_probabilities(z_t, self.temperature).exp(), y, self.threshold)
        log_q = log_probabilities(z_s, self.temperature)
        scale = self.temperature**2 if self.t2_scale else 1.0
        return scale * (torch.special.xlogy(p, p) - p * log_q).sum(dim=1)
