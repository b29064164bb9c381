"""Margins between documents that follow from the documents themselves."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import DistillationLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, check_same_shape, upcast
from lightning_lossplug.registry import register

Target = Literal["adaptive", "distributed"]
Error = Literal["square", "abs", "softplus"]


@register(
    "loss",
    "arm_selfdistill",
    family="distillation",
    paper="Learning Effective Representations for Retrieval Using Self-Distillation with Adaptive Relevance Margins",
    arxiv="2407.21515",
    signature="query_positive_negative",
)
class AdaptiveRelevanceMargin(DistillationLoss):
    r"""Adaptive relevance margins: mean of :math:`\phi(\cos(q_i, d^+_i) - \cos(q_i, d^-_i) - \tau_i)`.

    :math:`\tau_i = \cos(d^+_i, d^-_i)/2 + 1/2`, from the model itself, so no teacher is needed. ``in_batch``: all
    pairs; entry (i, j) is then :math:`\cos(q_j, d^+_j) - \cos(q_i, d^-_j)`, with the positive score by column, as
    released. ``distributed``: the margins of the triples against all targets (i, j). As in the released code a more
    similar negative asks for a *larger* margin; ``target_sign=-1`` turns that round
    (:math:`\tau = 1/2 - \cos/2`).

    Use it to train a retrieval model on triples without scores of a cross-encoder.

    Args:
        target: ``adaptive``, ``distributed``, or a constant margin.
        in_batch: All negatives of the batch for each query; not with ``distributed``.
        error: :math:`\phi`: ``square``, ``abs`` or ``softplus`` of the negative (``log(1 + exp(-x))``).
        detach_target: No gradient through :math:`\tau`; the released code lets it flow.
        target_sign: 1 or -1.
    """

    def __init__(
        self,
        target: Target | float = "adaptive",
        in_batch: bool = False,
        error: Error = "square",
        detach_target: bool = False,
        target_sign: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(target, str):
            check_choice("arm_selfdistill", "target", target, get_args(Target))
        check_choice("arm_selfdistill", "error", error, get_args(Error))
        if target == "distributed" and in_batch:
            raise LossplugError("target='distributed' and in_batch don't go together", where="arm_selfdistill")
        if target_sign not in (1, -1):
            raise LossplugError(f"target_sign is {target_sign}, allowed is 1 or -1", where="arm_selfdistill")
        self.target, self.in_batch, self.error = target, in_batch, error
        self.detach_target, self.target_sign = detach_target, target_sign

    def forward(self, query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Computes the loss of embeddings [N, D] of queries, relevant and other documents.

        Raises:
            LossplugError: Shapes that differ.
        """
        check_same_shape("arm_selfdistill", query=query, positive=positive, negative=negative)
        with torch.autocast(query.device.type, enabled=False):
            q, p, n = (F.normalize(upcast(x), dim=1) for x in (query, positive, negative))
            relevant, others = (q * p).sum(dim=1), q @ n.T
            margin = relevant[None, :] - others if self.in_batch else relevant - others.diagonal()
            gap = margin - self._targets(p, n)
            if self.error == "square":
                return gap.square().mean()
            return gap.abs().mean() if self.error == "abs" else F.softplus(-gap).mean()

    def _targets(self, p: Tensor, n: Tensor) -> Tensor | float:
        if not isinstance(self.target, str):
            return self.target
        similar = p @ n.T
        if self.target == "adaptive" and not self.in_batch:
            similar = similar.diagonal()
        tau = self.target_sign * similar / 2 + 0.5
        return tau.detach() if self.detach_target else tau
