"""Further outputs that answer questions about a picture, taught by a table of a large model's answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.base import DistillationLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_floating, check_number, upcast
from lightning_lossplug.registry import register

PAPER = "Multi-aspect Knowledge Distillation with Large Language Model"


@register("loss", "makd", family="distillation", paper=PAPER, arxiv="2501.13341", signature="logits_index_aspects")
class MAKD(DistillationLoss):
    r"""Multi-aspect distillation: :math:`CE(z_{:C}, y) + \alpha\,BCE(z_{C:}, a)`, mean over samples and questions.

    ``a`` [N, Q] is a multimodal model's probability of "yes" to Q questions about each sample, made once
    (:func:`aspects_of`). The classifier is widened by Q outputs before the optimizer is made (:func:`widen_classifier`)
    and cut back after training (:func:`narrow_classifier`).

    Use it where a large model can describe what it can't classify.

    Args:
        classes: C.
        alpha: Weight >= 0 of the questions.
    """

    def __init__(self, classes: int, alpha: float = 4.0) -> None:
        super().__init__()
        check_number("makd", "classes", classes, least=1)
        self.classes, self.alpha = classes, check_number("makd", "alpha", alpha, least=0)

    def forward(self, logits: Tensor, target: Tensor, aspects: Tensor) -> Tensor:
        """Computes the loss of logits [N, C + Q], class indices [N] and answers [N, Q] in [0, 1].

        Raises:
            LossplugError: Shapes that don't fit, or answers that are no probabilities.
        """
        check_floating("makd", logits=logits, aspects=aspects)
        if logits.shape != (len(aspects), self.classes + aspects.shape[1]):
            raise LossplugError(
                f"logits {tuple(logits.shape)} for {self.classes} classes and answers {tuple(aspects.shape)}",
                where="makd",
            )
        if aspects.device.type == "cpu" and not 0 <= float(aspects.min()) <= float(aspects.max()) <= 1:
            raise LossplugError("an answer is outside [0, 1]", where="makd", remedy="Give probabilities: aspects_of")
        z = upcast(logits)
        value = F.cross_entropy(z[:, : self.classes], target)
        if self.alpha == 0:
            return value
        return value + self.alpha * F.binary_cross_entropy_with_logits(z[:, self.classes :], aspects.to(z))


def aspects_of(yes: Tensor, no: Tensor) -> Tensor:
    """Returns the probability [N, Q] of "yes" from the logits [N, Q] of both words."""
    return (upcast(yes) - upcast(no)).sigmoid()


@torch.no_grad()
def widen_classifier(layer: nn.Linear, questions: int) -> nn.Linear:
    """Returns a linear layer with the given one's outputs and so many new ones behind them."""
    check_number("makd", "questions", questions, least=1)
    wide = nn.Linear(layer.in_features, layer.out_features + questions, layer.bias is not None).to(layer.weight)
    wide.weight[: layer.out_features] = layer.weight
    if layer.bias is not None:
        wide.bias[: layer.out_features] = layer.bias
    return wide


@torch.no_grad()
def narrow_classifier(layer: nn.Linear, classes: int) -> nn.Linear:
    """Returns a linear layer with the first ``classes`` outputs of the given one."""
    narrow = nn.Linear(layer.in_features, classes, layer.bias is not None).to(layer.weight)
    narrow.weight.copy_(layer.weight[:classes])
    if layer.bias is not None:
        narrow.bias.copy_(layer.bias[:classes])
    return narrow
