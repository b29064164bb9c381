"""Pseudo-labels of unlabelled data from class means of a teacher's features, weighed by how clear they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import DistillationLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register


class PseudoLabels(NamedTuple):
    """Labels for unlabelled samples.

    Args:
        target: Class indices [N].
        weight: How much each counts [N].
    """

    target: Tensor
    weight: Tensor


def class_means(features: Tensor, target: Tensor, classes: int) -> Tensor:
    """Returns the normalised mean feature [C, D] of each class of labelled samples [N, D].

    Raises:
        LossplugError: A class without a sample.
    """
    counts = target.bincount(minlength=classes)
    if bool((counts == 0).any()):
        raise LossplugError(f"class {int((counts == 0).nonzero()[0])} has no labelled sample", where="wad")
    total = torch.zeros(classes, features.shape[1]).to(features).index_add_(0, target, F.normalize(features, dim=1))
    return F.normalize(total, dim=1)


def pseudo_labels(features: Tensor, means: Tensor) -> PseudoLabels:
    """Returns the class of the most similar mean and, as weight, its cosine minus that of the second.

    The difference is the source's largest times (1 - second / largest), also where the largest is negative.

    Args:
        features: Of the unlabelled samples [N, D], from the teacher.
        means: Of the classes [C, D], at least two.
    """
    if len(means) < 2:
        raise LossplugError("needs at least 2 classes", where="wad")
    scores = (F.normalize(features, dim=1) @ means.T).topk(2, dim=1)
    return PseudoLabels(scores.indices[:, 0], scores.values[:, 0] - scores.values[:, 1])


def labelled_fraction(round_: int, rounds: int = 5, alpha: float = 0.1) -> float:
    """Returns which share of the unlabelled samples joins the labelled ones after a round: ``alpha`` down to 0."""
    check_number("wad", "rounds", rounds, least=1)
    return alpha * (1 - min(round_ / rounds, 1.0)) ** 2


@register(
    "loss",
    "wad",
    family="distillation",
    paper="Semi-Supervised Learning via Weight-aware Distillation under Class Distribution Mismatch",
    arxiv="2308.11874",
    signature="logits_index_weight",
)
class WAD(DistillationLoss):
    r"""Weight-aware distillation: :math:`CE(\text{labelled}) + \mathrm{mean}(w\,CE(\text{unlabelled}, \hat y))`.

    ``w`` is 1 for labelled samples. The pseudo-labels and weights come from a self-supervised teacher's features
    (:func:`class_means`, :func:`pseudo_labels`); after each round the samples with the least loss join the labelled
    set (:func:`labelled_fraction` says how many). A weight of 0 leaves a sample out.

    Use it where many unlabelled samples belong to no class that is asked for.
    """

    def forward(
        self, labelled: Tensor, target: Tensor, unlabelled: Tensor, pseudo_target: Tensor, weight: Tensor
    ) -> Tensor:
        """Computes the loss of logits [N, C] with targets [N] and logits [M, C] with pseudo-labels and weights [M].

        Raises:
            LossplugError: Shapes that don't fit.
        """
        if unlabelled.shape[:1] != weight.shape or weight.shape != pseudo_target.shape:
            raise LossplugError(
                f"{tuple(unlabelled.shape)} unlabelled logits, {tuple(pseudo_target.shape)} pseudo-labels and "
                f"{tuple(weight.shape)} weights don't fit",
                where="wad",
            )
        own = F.cross_entropy(upcast(labelled), target)
        rows = F.cross_entropy(upcast(unlabelled), pseudo_target, reduction="none")
        return own + (weight.detach() * rows).sum() / max(len(rows), 1)
