"""Confidence against accuracy, in bins that take no memory per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lossplug.errors import LossplugError


def check_least_one(where: str, name: str, value: int) -> int:
    """Returns ``value``, or raises unless it is a whole number from 1 on."""
    if not isinstance(value, int) or value < 1:
        raise LossplugError(f"{name} is {value!r}, allowed is 1 or more", where=where)
    return value


def confidence_bins(confidence: Tensor, bins: int) -> Tensor:
    """Returns the bin [N] of confidences [N]: equal widths, closed on the right, as (0, 1/B], ..., (1 - 1/B, 1]."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)[1:-1]
    return torch.bucketize(confidence.double(), edges)


def bin_sums(confidence: Tensor, right: Tensor, bins: int) -> Tensor:
    """Returns samples, sum of confidences and hits of each bin, [3, B] in float64."""
    place = confidence_bins(confidence, bins)
    rows = torch.stack([torch.ones_like(confidence), confidence, right]).double()
    return rows.new_zeros(3, bins).index_add_(1, place, rows)


def calibration_error(sums: Tensor) -> Tensor:
    """Returns the expected calibration error of :func:`bin_sums`; NaN without samples."""
    return (sums[2] - sums[1]).abs().sum() / sums[0].sum()


class Reliability(Metric):
    r"""Expected calibration error: :math:`\sum_b \frac{n_b}{N} |acc_b - conf_b|` over bins of the confidence.

    Confidence is the largest probability (T = 1); bins have equal widths and are closed on the right. The state is
    three numbers per bin, summed over processes, so that any number of tokens fits, and :meth:`curve` has what a
    reliability diagram shows.

    Args:
        bins: Number of bins, >= 1.
        ignore_index: Label of rows that don't count.
        **options: Given to ``torchmetrics.Metric``.

    Raises:
        LossplugError: ``bins`` is below 1.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    sums: Tensor

    def __init__(self, bins: int = 15, ignore_index: int = -100, **options: Any) -> None:
        super().__init__(**options)
        self.bins = check_least_one("Reliability", "bins", bins)
        self.ignore_index = ignore_index
        self.add_state("sums", torch.zeros(3, self.bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Counts logits [..., C] at class indices [...].

        Raises:
            LossplugError: Shapes that don't fit.
        """
        if logits.shape[:-1] != target.shape:
            raise LossplugError(
                f"logits {tuple(logits.shape)} and targets {tuple(target.shape)}",
                where="Reliability",
                remedy="Targets are class indices in the shape of the rows",
            )
        keep = target != self.ignore_index
        confidence, chosen = logits[keep].float().softmax(dim=-1).max(dim=-1)
        self.sums += bin_sums(confidence, chosen == target[keep], self.bins).to(self.sums.device)

    def compute(self) -> Tensor:
        """Returns the error, in [0, 1]; NaN before the first update."""
        return calibration_error(self.sums).float()

    def worst(self) -> Tensor:
        """Returns the maximum calibration error: the largest gap of a bin that holds samples."""
        count, confidence, hits = self.sums
        gaps = (hits - confidence).abs() / count
        return gaps[count > 0].max().float() if bool((count > 0).any()) else gaps.sum().float()

    def curve(self) -> dict[str, Tensor]:
        """Returns ``count``, mean ``confidence`` and ``accuracy`` of each bin; NaN where a bin is empty."""
        count, confidence, hits = self.sums
        return {"count": count, "confidence": confidence / count, "accuracy": hits / count}
