"""Standardised logits under any logit loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lossplug.distillation.base import BatchLogitLoss, LogitLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register, registry


def standardise(z: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Returns :math:`(z - \bar z)/(\epsilon + \mathrm{std}(z))` of each row, the deviation with C - 1."""
    return (z - z.mean(dim=-1, keepdim=True)) / (eps + z.std(dim=-1, keepdim=True))


@register(
    "loss",
    "logit_std",
    family="distillation",
    paper="Logit Standardization in Knowledge Distillation",
    arxiv="2403.01427",
    aliases=("logit_standardisation",),
    signature="logits_teacher",
)
class LogitStd(LogitLoss):
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
        host = registry.create("loss", loss, **{"temperature": temperature, **(parameters or {})})
        if not isinstance(host, LogitLoss) or isinstance(host, BatchLogitLoss):
            raise LossplugError(
                f"{loss!r} has no value per row of logits", where="logit_std", remedy="Use kd, dkd or another one"
            )
        super().__init__(host.reduction, host.ignore_index)
        self.host = host
        self.eps = check_number("logit_std", "eps", eps, least=0)
        self.needs_target = host.needs_target  # type: ignore[misc]

    @property
    def temperature(self) -> float:
        """T of the host."""
        return self.host.temperature  # type: ignore[return-value]

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.host.temperature = value  # type: ignore[assignment]

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """The host's rows of standardised logits."""
        return self.host.rows(standardise(z_s, self.eps), standardise(z_t, self.eps), y)
