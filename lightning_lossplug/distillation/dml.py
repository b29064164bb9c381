"""Networks that learn from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import OnlineLoss, check_temperature
from lightning_lossplug.distillation.divergences import kl_of_logs, log_probabilities
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


@register(
    "loss",
    "dml",
    family="distillation",
    paper="Deep Mutual Learning",
    arxiv="1706.00384",
    signature="online",
)
class DML(OnlineLoss):
    r"""Deep mutual learning: network i gets :math:`\frac{w T^2}{K-1} \sum_{j \ne i} KL(p_j \| p_i)` of K networks.

    All are updated from one forward pass; the others' predictions are detached. ``legacy_sum`` leaves the division by
    K - 1 out, as the released code does (the same for two networks).

    Use it to train two equal networks together, where there is no teacher to begin with.

    Args:
        weight: w >= 0.
        temperature: T > 0 of both sides.
        legacy_sum: Sum over the others instead of their mean.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        legacy_sum: bool = False,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        self.weight = check_number("dml", "weight", weight, least=0)
        self.temperature, self.legacy_sum = check_temperature("dml", temperature), legacy_sum

    def terms(self, logits: list[Tensor], y: Tensor | None) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        """Every network against the others."""
        logs = [log_probabilities(z, self.temperature) for z in logits]
        scale = self.weight * self.temperature**2 / (1 if self.legacy_sum else len(logits) - 1)
        rows = []
        for i, mine in enumerate(logs):
            others = [kl_of_logs(other.detach(), mine) for j, other in enumerate(logs) if j != i]
            rows.append(scale * torch.stack(others).sum(dim=0))
        return rows, {"kd_fkl": rows[0].detach().mean()}, None
