"""Knowledge distillation by softened logits."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import LogitLoss, check_temperature
from lightning_lossplug.distillation.divergences import forward_kl
from lightning_lossplug.losses.checks import check_choice
from lightning_lossplug.registry import register

Match = Literal["kl", "mse", "hard"]


@register(
    "loss",
    "kd",
    family="distillation",
    paper="Distilling the Knowledge in a Neural Network",
    arxiv="1503.02531",
    aliases=("hinton_kd",),
    signature="logits_teacher",
)
class KD(LogitLoss):
    r"""Hinton's distillation: :math:`T^2\, KL(p^T \| q^T)` of teacher p and student q, per row.

    ``divergence="mse"``: mean over classes of :math:`(z_s - z_t)^2`; ``"hard"``: cross-entropy to the teacher's top
    class (neither has a temperature). The benchmarks weigh it 0.9 beside 0.1 of the cross-entropy.

    Use it first: one number to tune, any model.

    Args:
        temperature: T > 0 of both sides.
        divergence: ``kl``, ``mse`` or ``hard``.
        t2_scale: Multiply by :math:`T^2`, which keeps the size of the gradients.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        divergence: Match = "kl",
        t2_scale: bool = True,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        check_choice("kd", "divergence", divergence, get_args(Match))
        self.temperature = check_temperature("kd", temperature)
        self.divergence, self.t2_scale = divergence, t2_scale

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row divergences."""
        if self.divergence == "mse":
            return (z_s - z_t).square().mean(dim=1)
        if self.divergence == "hard":
            return F.cross_entropy(z_s, z_t.argmax(dim=1), reduction="none")
        scale = self.temperature**2 if self.t2_scale else 1.0
        return scale * forward_kl(z_s, z_t, self.temperature)
