"""Networks that learn from an ensemble of themselves."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import OnlineLoss, check_temperature
from lightning_lossplug.distillation.divergences import kl_of_logs, log_probabilities
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.registry import register

Ensemble = Literal["minlogit", "naive"]


def ensemble_logits(logits: list[Tensor], y: Tensor, how: Ensemble) -> Tensor:
    """Returns the target logits [R, C] of several networks.

    ``minlogit``: entry c is the least of ``z_c - z_y`` over the networks; ``naive``: of each row the logits of the
    network with the lowest cross-entropy.
    """
    stack = torch.stack(logits)
    if how == "minlogit":
        index = y[None, :, None].expand(len(logits), -1, 1)
        return (stack - stack.gather(2, index)).amin(dim=0)
    losses = torch.stack([F.cross_entropy(z, y, reduction="none") for z in logits])
    best = losses.argmin(dim=0)
    return stack[best, torch.arange(len(y), device=y.device)]


@register(
    "loss",
    "kdcl",
    family="distillation",
    paper="Online Knowledge Distillation via Collaborative Learning (CVPR 2020)",
    signature="online_index",
)
class KDCL(OnlineLoss):
    r"""Collaborative learning: every network gets :math:`w T^2 KL(p_e^T \| p_i^T)` of an ensemble e, detached.

    The ensemble is built for each batch, see :func:`ensemble_logits`. Its forms that fit weights (convex combination,
    error covariance on held-out data) are not here, and the defaults are not confirmed to be the paper's.

    Use it with three or more networks.

    Args:
        ensemble: ``minlogit`` or ``naive``.
        weight: w >= 0.
        temperature: T > 0 of both sides.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    needs_target = True

    def __init__(
        self,
        ensemble: Ensemble = "minlogit",
        weight: float = 1.0,
        temperature: float = 2.0,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        check_choice("kdcl", "ensemble", ensemble, get_args(Ensemble))
        self.ensemble: Ensemble = ensemble
        self.weight = check_number("kdcl", "weight", weight, least=0)
        self.temperature = check_temperature("kdcl", temperature)

    def terms(self, logits: list[Tensor], y: Tensor | None) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        """Every network against the ensemble."""
        assert y is not None
        target = ensemble_logits([z.detach() for z in logits], y, self.ensemble)
        log_e = log_probabilities(target, self.temperature)
        scale = self.weight * self.temperature**2
        rows = [scale * kl_of_logs(log_e, log_probabilities(z, self.temperature)) for z in logits]
        return rows, {"kd_fkl": rows[0].detach().mean()}, None
