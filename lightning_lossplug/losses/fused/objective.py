"""A loss of the statistics, bound to the labels and weights of the kept rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lossplug.losses.base import FusableLoss
from lightning_lossplug.losses.fused.blocks import Coefficients
from lightning_lossplug.losses.stats import LogitStats


@dataclass(frozen=True)
class Objective:
    """What a fused head computes for every row.

    Args:
        loss: The loss.
        y: Class indices of the rows, [R].
        class_weight: [V] or None.
        row_weight: Factor of each row's loss, [R] or None.
    """

    loss: FusableLoss
    y: Tensor
    class_weight: Tensor | None = None
    row_weight: Tensor | None = None

    @property
    def u(self) -> Tensor | None:
        """Weights of the statistic ``sum``."""
        return self.loss.sum_weights(self.class_weight) if "sum" in self.loss.needs else None

    def rows(self, stats: LogitStats, part: slice = slice(None)) -> Tensor:
        """Returns the weighted losses of a part of the rows."""
        rows = self.loss.weighted_from_stats(stats, self.y[part], self.class_weight)
        return rows if self.row_weight is None else rows * self.row_weight[part]

    def differentiate(self, stats: LogitStats, part: slice, factor: Tensor) -> tuple[Tensor, Coefficients]:
        """Returns the summed losses of a part of the rows and ``factor`` times their gradients by the statistics."""
        with torch.enable_grad():
            leaves = [None if s is None else s.detach().requires_grad_() for s in (stats.lse, stats.target, *stats[3:])]
            total = self.rows(LogitStats(leaves[0], leaves[1], stats.classes, *leaves[2:]), part).sum()  # type: ignore[arg-type]
            wanted = [leaf for leaf in leaves if leaf is not None]
            found = iter(torch.autograd.grad(total, wanted, factor.to(total), allow_unused=True))
        return total.detach(), Coefficients(*(None if leaf is None else next(found) for leaf in leaves))
