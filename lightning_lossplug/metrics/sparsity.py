"""Shares of zeros and of compliant groups over any number of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lossplug.metrics.counts import compliant_groups, zeros


class _Share(Metric):
    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    hits: Tensor
    total: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("hits", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Returns the share, in [0, 1]; NaN before the first update."""
        return self.hits.float() / self.total


class Sparsity(_Share):
    """Share of weights that are exactly zero.

    ``update(weight)`` takes a tensor of any shape; weights of several layers add up. On several processes each has to
    update with weights of its own (shards, say): counts are summed.
    """

    def update(self, weight: Tensor) -> None:
        """Counts a weight."""
        self.hits += zeros(weight)
        self.total += weight.numel()


class NMCompliance(_Share):
    """Share of groups of M consecutive weights with at most N nonzeros.

    Args:
        n: Nonzeros allowed per group.
        m: Group size along the reduction axis.
        **options: Given to ``torchmetrics.Metric``.
    """

    higher_is_better = True

    def __init__(self, n: int = 2, m: int = 4, **options: Any) -> None:
        super().__init__(**options)
        self.n, self.m = n, m

    def update(self, weight: Tensor, dim: int = -1) -> None:
        """Counts the groups of a weight along ``dim``.

        Raises:
            LossplugError: ``m`` doesn't divide the axis.
        """
        good, groups = compliant_groups(weight, self.n, self.m, dim)
        self.hits += good
        self.total += groups
