"""Distillation of relations between classes and between samples, by correlation."""

from __future__ import annotations

from torch import Tensor

from lightning_lossplug.distillation.base import BatchLogitLoss, check_temperature
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


def correlation(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Returns Pearson's correlation of the rows of two matrices, ``eps`` added to the product of the norms."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + eps)


@register(
    "loss",
    "dist",
    family="distillation",
    paper="Knowledge Distillation from A Stronger Teacher",
    arxiv="2205.10536",
    signature="logits_teacher",
)
class DIST(BatchLogitLoss):
    r"""DIST: :math:`\tau^2 (\beta\,(1 - \bar\rho_{rows}) + \gamma\,(1 - \bar\rho_{columns}))` of softened outputs.

    :math:`\rho` is Pearson's correlation between student and teacher: of each sample over the classes, and of each
    class over the samples of this process's batch. A batch of one sample has no second part.

    Use it when the teacher is much stronger: it asks for the order of the classes, not for the values.

    Args:
        beta: Weight >= 0 of the correlation over classes.
        gamma: Weight >= 0 of the correlation over samples.
        tau: Temperature > 0.
        reduction: ``batchmean``, ``tokenmean`` or ``pixelmean``: where the classes are.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        self.beta = check_number("dist", "beta", beta, least=0)
        self.gamma = check_number("dist", "gamma", gamma, least=0)
        self.tau = check_temperature("dist", tau, "tau")

    def batch(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Both parts of the kept rows."""
        q, p = (z_s / self.tau).softmax(dim=1), (z_t / self.tau).softmax(dim=1)
        value = self.beta * (1 - correlation(q, p).mean())
        if len(q) > 1:
            value = value + self.gamma * (1 - correlation(q.T, p.T).mean())
        return self.tau**2 * value
