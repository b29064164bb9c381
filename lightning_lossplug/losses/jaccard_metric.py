"""Jaccard metric losses: IoU, Dice and Tversky losses that are right for soft labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.losses.masks import class_masks, ratio
from lightning_lossplug.registry import register


@register(
    "loss",
    "jaccard_metric",
    family="segmentation",
    paper="Jaccard Metric Losses: Optimizing the Jaccard Index with Soft Labels",
    arxiv="2302.05666",
    signature="masks",
)
class JaccardMetric(Loss):
    r"""Overlap loss with its minimum at x = y also for soft labels (label smoothing, distillation, several annotators).

    With sums over pixels, per class: :math:`fp = \sum (x-y)_+`, :math:`fn = \sum (y-x)_+`,
    :math:`tp = \sum \min(x, y)` (``jml1``, the form of the authors' code) or :math:`\sum x y` (``jml2``);
    :math:`T = (tp + s)/(tp + \alpha fp + \beta fn + s)` and the loss is :math:`(1 - T)^\gamma`, or
    :math:`(-\log T)^\gamma` with ``log_loss``. :math:`\alpha = \beta = 1` is the Jaccard index, 1/2 is Dice. The loss
    is a weighted sum of three averages: ``mIoUD`` (tp, fp, fn summed over the batch; mean over active classes),
    ``mIoUI`` (per image: mean over its active classes, then over images), ``mIoUC`` (per class: mean over the images
    that have it, then over classes). Active are classes with a label above ``threshold`` for class indices, all classes
    for soft labels.

    Logits [B, C, *] with class indices [B, *] or probabilities [B, C, *]; C = 1 is one foreground class. The result is
    a scalar. Under data parallelism every rank averages its own batch, so ``mIoUD`` differs from that of the joint
    batch. Use it together with cross-entropy to train segmentation for mIoU (arXiv 2302.05666, 2303.16296, 2310.19252).

    Args:
        mIoUD: Weight >= 0 of the average over the data set (here: the batch).
        mIoUI: Weight >= 0 of the average over images.
        mIoUC: Weight >= 0 of the average over classes.
        alpha: Weight >= 0 of false positives.
        beta: Weight >= 0 of false negatives.
        gamma: Exponent >= 1; above 1 the classes that are segmented worst weigh more.
        smooth: >= 0, added above and below.
        threshold: Label above which a class counts as present, for class indices, >= 0.
        log_loss: Take the logarithm.
        ignore_index: Class index of pixels that are left out.
        class_weights: One weight >= 0 per class, multiplied on; the averages don't divide by their sum.
        form: ``jml1`` or ``jml2``.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        mIoUD: float = 1.0,
        mIoUI: float = 0.0,
        mIoUC: float = 0.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        smooth: float = 1e-3,
        threshold: float = 0.01,
        log_loss: bool = False,
        ignore_index: int = -100,
        class_weights: Tensor | Sequence[float] | None = None,
        form: Literal["jml1", "jml2"] = "jml1",
    ) -> None:
        super().__init__("mean")
        where = "jaccard_metric"
        self.mIoUD, self.mIoUI, self.mIoUC = (
            check_number(where, name, value, least=0)
            for name, value in (("mIoUD", mIoUD), ("mIoUI", mIoUI), ("mIoUC", mIoUC))
        )
        if mIoUD + mIoUI + mIoUC == 0:
            raise LossplugError(
                "mIoUD, mIoUI and mIoUC are all 0, so the loss is", where=where, remedy="Set one above 0"
            )
        self.alpha = check_number(where, "alpha", alpha, least=0)
        self.beta = check_number(where, "beta", beta, least=0)
        self.gamma = check_number(where, "gamma", gamma, least=1)
        self.smooth = check_number(where, "smooth", smooth, least=0)
        self.threshold = check_number(where, "threshold", threshold, least=0)
        check_choice(where, "form", form, ("jml1", "jml2"))
        self.log_loss, self.ignore_index, self.form = log_loss, ignore_index, form
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.get_default_dtype())
        if weights is not None and (weights.ndim != 1 or not bool((weights >= 0).all())):
            raise LossplugError("class_weights have to be one number >= 0 per class", where=where)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor, *, keep_mask: Tensor | None = None) -> Tensor:
        """Computes the loss.

        Args:
            logits: [B, C, *].
            target: Class indices [B, *], or soft labels [B, C, *].
            keep_mask: Bool [B, *]; False leaves a pixel out.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        with torch.autocast(logits.device.type, enabled=False):
            x, y, hard = class_masks(logits, target, self.ignore_index, keep_mask, "jaccard_metric")
            if self.class_weights is not None and self.class_weights.numel() != x.shape[1]:
                raise LossplugError(
                    f"{self.class_weights.numel()} class_weights for {x.shape[1]} classes", where="jaccard_metric"
                )
            tp = (torch.minimum(x, y) if self.form == "jml1" else x * y).sum(dim=2)
            fp, fn = (x - y).relu().sum(dim=2), (y - x).relu().sum(dim=2)
            active = (y > self.threshold).any(dim=2) if hard else torch.ones_like(tp, dtype=torch.bool)
            total = logits.sum() * 0 if x.numel() == 0 else tp.new_zeros(())
            if self.mIoUD:
                loss = self._loss(tp.sum(0), fp.sum(0), fn.sum(0))
                total = total + self.mIoUD * _mean(loss, active.any(dim=0), 0)
            if self.mIoUI or self.mIoUC:
                loss = self._loss(tp, fp, fn)
                for weight, dim in ((self.mIoUI, 1), (self.mIoUC, 0)):
                    total = total + weight * _mean(_mean(loss, active, dim), active.any(dim=dim), 0)
            return total

    def _loss(self, tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
        tversky = ratio(tp + self.smooth, tp + self.alpha * fp + self.beta * fn + self.smooth)
        loss = -tversky.clamp_min(torch.finfo(tp.dtype).tiny).log() if self.log_loss else 1 - tversky
        # Rounding may leave 1 - T just below 0, where a fractional power is NaN.
        loss = loss if self.gamma == 1 else loss.clamp_min(0) ** self.gamma
        return loss if self.class_weights is None else loss * self.class_weights.to(loss)


def _mean(values: Tensor, active: Tensor, dim: int) -> Tensor:
    """Mean over the active entries; 0 without one."""
    return torch.where(active, values, 0).sum(dim) / active.sum(dim).clamp_min(1)
