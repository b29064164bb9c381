"""Standardised logits under any logit loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import DistillationLoss, LogitLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register, registry


def standardise(z: Tensor, eps: float = 1e-7, dim: int = -1) -> Tensor:
    r"""Returns :math:`(z - \bar z)/(\epsilon + \mathrm{std}(z))` along ``dim``, the deviation with C - 1."""
    return (z - z.mean(dim=dim, keepdim=True)) / (eps + z.std(dim=dim, keepdim=True))


@register(
    "loss",
    "logit_std",
    family="distillation",
    paper="Logit Standardization in Knowledge Distillation",
    arxiv="2403.01427",
    aliases=("logit_standardisation",),
    signature="logits_teacher",
)
class LogitStd(DistillationLoss):
    r"""Logit standardisation: the logits of both sides become :math:`(z - \bar z)/(\epsilon + \mathrm{std}(z))` first.

    Then the host loss with its temperature and :math:`T^2`. The student may keep its own mean and scale of logits.

    Use it with a large weight (9 beside 0.1 of the cross-entropy in the paper) when teacher and student differ in size.

    Args:
        loss: Name of the host loss: ``kd``, ``dkd`` or another loss of logits.
        temperature: T > 0 of the host.
        parameters: Further parameters of the host.
        eps: Added to the deviation.
    """

    def __init__(
        self,
        loss: str = "kd",
        temperature: float = 2.0,
        parameters: dict[str, Any] | None = None,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        host = registry.create("loss", loss, **{"temperature": temperature, **(parameters or {})})
        if not isinstance(host, LogitLoss):
            raise LossplugError(f"{loss!r} is not a loss of logits and a teacher", where="logit_std")
        self.host = host
        self.eps = check_number("logit_std", "eps", eps, least=0)
        self.needs_target = host.needs_target  # type: ignore[misc]

    @property
    def temperature(self) -> float:
        """T of the host."""
        return self.host.temperature  # type: ignore[return-value]

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.host.temperature = value

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the host's loss of standardised logits; the arguments are the host's."""
        dim = 1 if (reduction or self.host.reduction) == "pixelmean" else -1
        with torch.autocast(student.device.type, enabled=False):
            z_s, z_t = (standardise(upcast(z), self.eps, dim) for z in (student, teacher.detach()))
        return self.host(
            z_s, z_t, target, mask=mask, sample_weight=sample_weight, denominator=denominator, reduction=reduction
        )
