"""Distillation on the levels of samples, batch and classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import BatchLogitLoss, check_temperature
from lightning_lossplug.distillation.divergences import forward_kl
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


@register(
    "loss",
    "mlkd",
    family="distillation",
    paper="Multi-Level Logit Distillation (CVPR 2023)",
    signature="logits_teacher",
)
class MLKD(BatchLogitLoss):
    r"""Multi-level logit distillation: at each temperature T the sum of three parts.

    Instances: :math:`T^2 KL`, mean over samples; batch: :math:`\|P_t P_t^\top - P_s P_s^\top\|_F^2 / N`; classes:
    :math:`\|P_t^\top P_t - P_s^\top P_s\|_F^2 / C`. Only samples whose teacher confidence is at most the
    ``conf_percentile``-th percentile enter the first part (the mean still divides by all of them). This is the clean
    form: the released code multiplies the mask into an average. For a second, stronger view call it again.

    Use it when the batch is large enough to hold every class.

    Args:
        temperatures: T > 0, each.
        conf_percentile: In [0, 100]; 100 keeps every sample.
        reduction: ``batchmean``, ``tokenmean`` or ``pixelmean``: where the classes are.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        conf_percentile: float = 50.0,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        if not temperatures:
            raise LossplugError("temperatures is empty", where="mlkd")
        self.temperatures = [check_temperature("mlkd", t) for t in temperatures]
        self.conf_percentile = check_number("mlkd", "conf_percentile", conf_percentile, least=0, most=100)

    def batch(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """The sum over temperatures."""
        confidence = z_t.softmax(dim=1).amax(dim=1)
        unsure = confidence <= torch.quantile(confidence, self.conf_percentile / 100)
        value = z_s.new_zeros(())
        for t in self.temperatures:
            q, p = (z_s / t).softmax(dim=1), (z_t / t).softmax(dim=1)
            instances = t**2 * torch.where(unsure, forward_kl(z_s, z_t, t), 0).mean()
            batch = (p @ p.T - q @ q.T).square().sum() / len(q)
            classes = (p.T @ p - q.T @ q).square().sum() / q.shape[1]
            value = value + instances + batch + classes
        return value
