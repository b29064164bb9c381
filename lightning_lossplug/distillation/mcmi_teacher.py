"""A teacher that says more than the class: training it for conditional mutual information."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.divergences import kl_of_logs, log_probabilities
from lightning_lossplug.distillation.signals import logits_of
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import ClassificationLoss
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register


def conditional_mutual_information(logits: Tensor, target: Tensor, centroids: Tensor) -> Tensor:
    r"""Returns the mean over samples of :math:`KL(p_n \| Q^{y_n})`, ``Q`` [C, C] the mean output of each class.

    The gradient flows through p, not through Q.
    """
    return information_rows(upcast(logits), target, centroids).mean()


def information_rows(z: Tensor, y: Tensor, centroids: Tensor) -> Tensor:
    """Returns the divergence [N] of each sample's output from its class's centroid."""
    log_p = log_probabilities(z)
    log_q = centroids.detach().to(log_p).clamp(min=torch.finfo(torch.float32).tiny).log()
    return kl_of_logs(log_p, log_q[y])


@torch.no_grad()
def class_centroids(network: nn.Module, batches: Iterable[Any], classes: int) -> Tensor:
    """Returns the mean softmax output [C, C] of each class over ``(x, y, ...)`` batches, in the network's mode.

    Raises:
        LossplugError: A class without a sample.
    """
    total, count = torch.zeros(classes, classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    where = next((p.device for p in network.parameters()), torch.device("cpu"))
    for batch in batches:
        p = upcast(logits_of(network(batch[0].to(where)), None, type(network).__name__)).softmax(dim=1).cpu().double()
        total.index_add_(0, batch[1].cpu(), p)
        count.index_add_(0, batch[1].cpu(), torch.ones(len(p), dtype=torch.float64))
    if bool((count == 0).any()):
        raise LossplugError(f"class {int((count == 0).nonzero()[0])} has no sample", where="mcmi_teacher")
    return (total / count[:, None]).float()


@register(
    "loss",
    "mcmi_teacher",
    family="distillation",
    paper="Bayes Conditional Distribution Estimation for KD Based on Conditional Mutual Information",
    arxiv="2401.08732",
    signature="logits_index",
)
class MCMITeacher(ClassificationLoss):
    r"""The teacher's own loss: :math:`CE - \lambda\,\mathrm{mean}_n KL(p_n \| Q^{y_n})`.

    Fine-tunes a trained teacher (20 epochs, learning rate 0.05 with a cosine in the source) so that its outputs tell
    more of a sample than its class; then any other method distils from it. ``SwapLoss(MCMITeacher(centroids))`` puts it
    in place of the cross-entropy. Q is the mean output of each class (:func:`class_centroids`), held fixed, or moved
    with ``momentum`` towards each batch's outputs. Choose ``lambda`` by the student, not by the teacher's accuracy.

    Use it where students of a very sure teacher stay behind, or data are few.

    Args:
        centroids: Q [C, C], rows of probabilities.
        lambda_: Weight >= 0.
        momentum: 1: fixed; below: each sample moves its class's row to this much of itself (in training mode).
        ignore_index: Label of rows that are left out.
        reduction: ``mean``, ``sum`` or ``none``.
    """

    centroids: Tensor

    def __init__(
        self,
        centroids: Tensor,
        lambda_: float = 0.15,
        momentum: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(None, ignore_index, reduction)
        if centroids.ndim != 2 or centroids.shape[0] != centroids.shape[1]:
            raise LossplugError(f"centroids have shape {tuple(centroids.shape)}, expected [C, C]", where="mcmi_teacher")
        if bool((centroids < 0).any()) or bool(((centroids.sum(dim=1) - 1).abs() > 1e-3).any()):
            raise LossplugError("a row of centroids is no distribution", where="mcmi_teacher")
        self.register_buffer("centroids", centroids.detach().clone())
        self.lambda_ = check_number("mcmi_teacher", "lambda", lambda_, least=0)
        self.momentum = check_number("mcmi_teacher", "momentum", momentum, least=0, most=1)

    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """Row losses; in training mode the centroids move afterwards."""
        if z.shape[1] != len(self.centroids):
            raise LossplugError(
                f"logits of {z.shape[1]} classes for centroids of {len(self.centroids)}", where="mcmi_teacher"
            )
        value = F.cross_entropy(z, y, reduction="none")
        if self.lambda_:
            value = value - self.lambda_ * information_rows(z, y, self.centroids)
        if self.training and self.momentum < 1:
            self._move(z.detach().softmax(dim=1), y)
        return value

    @torch.no_grad()
    def _move(self, p: Tensor, target: Tensor) -> None:
        counts = target.bincount(minlength=len(self.centroids)).to(p)
        means = torch.zeros_like(self.centroids).index_add_(0, target, p.to(self.centroids))
        means = means / counts[:, None].clamp(min=1)
        keep = self.momentum ** counts[:, None]  # a class that is not in the batch stays
        self.centroids.copy_(F.normalize(keep * self.centroids + (1 - keep) * means, p=1, dim=1))
