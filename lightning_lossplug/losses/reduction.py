"""Reduction of row losses with ignored rows, class weights, sample weights and an explicit denominator."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError

Reduction = Literal["none", "mean", "sum"]


def check_reduction(reduction: str) -> None:
    """Raises :class:`LossplugError` unless ``reduction`` is one of ``none``, ``mean``, ``sum``."""
    if reduction not in get_args(Reduction):
        raise LossplugError(f"reduction is {reduction!r}", remedy="Use 'none', 'mean' or 'sum'")


def reduce_rows(
    rows: Tensor,
    divisor: Tensor | float | None,
    reduction: str,
    anchor: Tensor,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Reduces row losses that are already weighted, zero where ignored.

    Args:
        rows: Row losses, any shape.
        divisor: What ``mean`` divides by: the summed weights of the kept rows; None: the number of rows.
        reduction: ``none``, ``mean`` or ``sum``.
        anchor: The logits, so that a batch without a kept row gives a zero that is still part of the graph (no rank
            of a distributed run then waits for a gradient that never comes).
        denominator: Replaces ``divisor``: exact means over accumulation windows or ranks.

    Returns:
        ``rows`` for ``none``, else a scalar. Without a kept row the mean is 0 with a zero gradient (``torch.nn``
        gives NaN there).
    """
    check_reduction(reduction)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "mean":
        if denominator is not None:
            total = total / denominator
        else:
            if divisor is None:
                divisor = float(rows.numel())
            if not isinstance(divisor, Tensor):
                divisor = torch.tensor(divisor, dtype=total.dtype, device=total.device)
            total = torch.where(divisor > 0, total / torch.where(divisor > 0, divisor, 1), 0)
    return total + anchor.sum() * 0 if rows.numel() == 0 else total
