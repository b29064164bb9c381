"""A second head for the distillation, thrown away after training."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.base import LogitLoss, check_temperature
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.registry import register

Form = Literal["norm", "plain"]
HeadKind = Literal["linear", "nonlinear"]


def auxiliary_head(kind: HeadKind, features: int, classes: int) -> nn.Module:
    """Returns the second head: linear, or a linear layer to 200, dropout, batch norm, ReLU and a linear layer."""
    check_choice("dhkd", "head", kind, get_args(HeadKind))
    if kind == "linear":
        return nn.Linear(features, classes)
    return nn.Sequential(
        nn.Linear(features, 200), nn.Dropout(0.1), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, classes)
    )


@register(
    "loss",
    "dhkd",
    family="distillation",
    paper="Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
    arxiv="2411.08937",
    signature="logits_teacher",
    dual_head=True,
)
class DHKD(LogitLoss):
    r"""Dual-head distillation: a logit-level loss on a second head, which meets the task loss in the backbone only.

    ``norm`` (the paper's choice), with :math:`d = (z_2 - z_t)/T`:
    :math:`\alpha T^2 \sum_c [\tfrac12 \log\frac{1/2}{\sigma(d)} + \tfrac12 \log\frac{1/2}{1 - \sigma(d)}]`.
    ``plain``: :math:`\alpha T^2 \sum_c KL(\mathrm{Bernoulli}(\sigma(z_t/T)) \| \mathrm{Bernoulli}(\sigma(z_2/T)))`.
    Written with softplus, so without the clamp of the released code (values differ where |d| > 18.4). In the
    ``Distillation`` callback the second head reads the input of the student's classifier and is trained beside it;
    elsewhere pass the second head's logits as ``student``. The released commands for unlike networks have
    ``head="nonlinear"`` and gradient alignment: ``Distillation(..., align="all")``.

    Use it where cross-entropy and a logit loss on one head work against each other.

    Args:
        temperature: T > 0.
        alpha: Weight >= 0; 1 on CIFAR-100, 0.1 on ImageNet.
        form: ``norm`` or ``plain``.
        head: Kind of the second head: ``linear`` or ``nonlinear``.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        alpha: float = 1.0,
        form: Form = "norm",
        head: HeadKind = "linear",
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        check_choice("dhkd", "form", form, get_args(Form))
        check_choice("dhkd", "head", head, get_args(HeadKind))
        self.temperature = check_temperature("dhkd", temperature)
        self.alpha = check_number("dhkd", "alpha", alpha, least=0)
        self.form, self.head_kind = form, head
        self.head: nn.Module | None = None  # made when the widths are known

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row losses."""
        t = self.temperature
        if self.form == "norm":
            # log(1/sigma(d)) + log(1/(1 - sigma(d))) = softplus(-d) + softplus(d), and softplus(d) - d = softplus(-d)
            d = (z_s - z_t) / t
            entries = (F.softplus(d) + F.softplus(-d)) / 2 - F.softplus(d.new_zeros(()))
        else:
            s, p = z_s / t, (z_t / t).sigmoid()
            entries = F.softplus(s) - p * s - (F.softplus(z_t / t) - p * z_t / t)
        return self.alpha * t**2 * entries.sum(dim=1)
