"""Correctness-aware calibration: confidence is to equal the correctness of the frozen model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import ClassificationLoss, check_parameter, flatten_logits, upcast
from lightning_lossplug.registry import register

PAPER = "Optimizing Calibration by Gaining Aware of Prediction Correctness"


@register(
    "loss", "correctness_aware", family="classification", paper=PAPER, arxiv="2404.13016", signature="logits_index"
)
class CorrectnessAware(ClassificationLoss):
    r"""Squared distance of confidence and correctness, :math:`l = (\max_k p_k - c)^2` (arXiv 2404.13016).

    ``p`` is the softmax of the calibrated logits, ``c`` is 1 where the frozen model's largest logit is the label. A
    calibrator (:class:`SampleTemperature`) is trained with it on a validation split; the paper: Adam, 1e-4, 10 epochs,
    batches of 1000.

    When: after training, to separate right from wrong predictions by confidence.

    Args:
        balance: Weigh right rows by the share of wrong ones and the other way round (scaled to mean 1); a batch all
            right or all wrong is left unweighted.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    row_inputs = ("correct", "factor")

    def __init__(
        self,
        balance: bool = True,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        self.balance = balance

    def forward(self, logits: Tensor, target: Tensor, *, base_logits: Tensor | None = None, **options: Any) -> Tensor:
        """Computes the loss.

        Args:
            logits: Calibrated logits [N, C, *] or [..., C].
            target: Class indices.
            base_logits: The frozen model's logits, same shape. None: those of ``logits``, right where the calibrator
                keeps the order of the classes, as a temperature does.
            options: As in :meth:`ClassificationLoss.forward`.
        """
        base = logits if base_logits is None else base_logits
        if base.shape != logits.shape:
            raise LossplugError(
                f"base_logits {tuple(base.shape)} for logits {tuple(logits.shape)}", where="correctness_aware"
            )
        soft = target.is_floating_point() and target.shape == logits.shape
        z, _ = flatten_logits(base.detach(), target, soft, "correctness_aware")
        if soft or not len(z):
            return super().forward(logits, target, **options)
        keep = self.kept(target, options.get("ignore_index"))
        correct = z.argmax(dim=1).view(target.shape) == target
        factor = upcast(z).new_ones(target.shape)
        if self.balance:
            accuracy = (correct & keep).sum().to(factor) / keep.sum().clamp_min(1)
            mean = 2 * accuracy * (1 - accuracy)
            balanced = torch.where(correct, 1 - accuracy, accuracy) / mean.clamp_min(1e-12)
            factor = torch.where(mean > 0, balanced, factor)
        return super().forward(logits, target, correct=correct, factor=factor, **options)

    def rows(self, z: Tensor, y: Tensor, *, correct: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """Squared differences; unweighted rows of plain logits without the row inputs."""
        correct = z.argmax(dim=1) == y if correct is None else correct
        confidence = (z.amax(dim=1) - z.logsumexp(dim=1)).exp()
        rows = (confidence - correct.to(z)).square()
        return rows if factor is None else rows * factor.to(z)


class SampleTemperature(nn.Module):
    """Calibrator: divides the logits of each sample by a temperature computed from its confidences (arXiv 2404.13016).

    The input is the softmax, sorted, of the sample and optionally of transformed copies of it (rotated, grey, colour
    jitter); only its largest values count. Starts at temperature 1. The width is not from the paper.

    Args:
        top_k: Largest probabilities taken from each view, >= 1.
        views: Number of views, the plain one included, >= 1.
        width: Hidden units, >= 1.
    """

    def __init__(self, top_k: int = 5, views: int = 1, width: int = 16) -> None:
        super().__init__()
        for name, value in (("top_k", top_k), ("views", views), ("width", width)):
            check_parameter(value >= 1, "SampleTemperature", name, value, ">= 1")
        self.top_k, self.views = top_k, views
        self.hidden = nn.Linear(top_k * views, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, logits: Tensor, *copies: Tensor) -> Tensor:
        """Returns calibrated logits [N, C].

        Args:
            logits: The frozen model's logits [N, C].
            copies: Its logits for the transformed copies, each [N, C].

        Raises:
            LossplugError: Not ``views`` sets of logits, or fewer classes than ``top_k``.
        """
        views = (logits, *copies)
        if len(views) != self.views or logits.shape[-1] < self.top_k:
            raise LossplugError(
                f"{len(views)} views of {logits.shape[-1]} classes, set up for {self.views} and top_k={self.top_k}",
                where="SampleTemperature",
            )
        probabilities = [v.softmax(dim=-1).topk(self.top_k, dim=-1).values for v in views]
        raw = self.out(F.relu(self.hidden(torch.cat(probabilities, dim=-1))))
        return logits / raw.clamp(-2.3, 2.3).exp()
