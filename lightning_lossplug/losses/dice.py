"""Soft Dice loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.checks import check_choice, check_number, reduce_weighted, row_weights
from lightning_lossplug.losses.masks import class_masks, ratio
from lightning_lossplug.registry import register


@register(
    "loss",
    "dice",
    family="segmentation",
    paper="SeaBird: Segmentation in Bird's View with Dice Loss Improves Monocular 3D Detection of Large Objects",
    arxiv="2403.20318",
    signature="masks",
)
class Dice(Loss):
    r"""Soft Dice loss :math:`1 - \frac{2 \sum xy + s}{\sum x + \sum y + s}` (with ``squared``: of squares below).

    x are probabilities, y labels; the sums run over the pixels of one image, or with ``batch`` over all images. Logits
    [B, C, *] with class indices [B, *] or probabilities [B, C, *]; C = 1 is one foreground class. A class that is
    nowhere in the label has loss 1 and next to no gradient while ``smooth`` is small. Use it where the foreground is
    small; with soft labels use ``jaccard_metric`` with alpha = beta = 0.5, which is smallest at x = y and this is not
    (arXiv 2403.20318, after V-Net).

    Args:
        average: ``macro`` (mean over classes) or ``micro`` (sums over classes first).
        smooth: s >= 0; many libraries take 1.
        squared: Squares in the denominator, as in V-Net.
        ignore_index: Class index of pixels that are left out.
        batch: Sum over the whole batch before dividing.
        reduction: ``none`` (one value per image [B]; [1] with ``batch``), ``mean`` or ``sum``.
    """

    def __init__(
        self,
        average: Literal["macro", "micro"] = "macro",
        smooth: float = 1e-8,
        squared: bool = False,
        ignore_index: int = -100,
        batch: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        check_choice("dice", "average", average, ("macro", "micro"))
        self.smooth = check_number("dice", "smooth", smooth, least=0)
        self.average, self.squared, self.ignore_index, self.batch = average, squared, ignore_index, batch

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        keep_mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: [B, C, *].
            target: Class indices [B, *], or soft labels [B, C, *].
            keep_mask: Bool [B, *]; False leaves a pixel out.
            sample_weight: Weights >= 0 of the images [B]; with ``batch`` they weigh the sums.
            denominator: What ``mean`` divides by instead.
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        with torch.autocast(logits.device.type, enabled=False):
            x, y, _ = class_masks(logits, target, self.ignore_index, keep_mask, "dice")
            weight = None if sample_weight is None else row_weights(sample_weight, x.shape[:1], x, "dice")
            both = 2 * (x * y).sum(dim=2)
            single = (x * x + y * y if self.squared else x + y).sum(dim=2)
            if self.batch:
                both, single = (t if weight is None else t * weight[:, None] for t in (both, single))
                both, single, weight = both.sum(0, keepdim=True), single.sum(0, keepdim=True), None
            if self.average == "micro":
                both, single = both.sum(1, keepdim=True), single.sum(1, keepdim=True)
            rows = (1 - ratio(both + self.smooth, single + self.smooth)).mean(dim=1)
            return reduce_weighted(rows, weight, reduction or self.reduction, logits, denominator)
