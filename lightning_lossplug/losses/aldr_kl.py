"""ALDR-KL: LDR-KL whose temperature adapts to every training sample."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import ClassificationLoss, check_index, check_parameter
from lightning_lossplug.losses.exchange import gather_rows
from lightning_lossplug.losses.ldr_kl import Normalize, ldr_kl, margin_differences, normalize_scores
from lightning_lossplug.registry import register


@register(
    "loss",
    "aldr_kl",
    family="classification",
    paper="Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity",
    arxiv="2112.14869",
    signature="logits_index",
    needs=("index", "dataset_size"),
    stateful=True,
    gather=True,
)
class ALDRKL(ClassificationLoss):
    r"""Adaptive LDR-KL (arXiv 2112.14869): every sample has its own lambda, chosen by the loss.

    :math:`l = \max_{\lambda \ge 0} \lambda \log \frac1C \sum_k e^{d_k/\lambda}
    - \frac{\alpha \log C}{2 \lambda_0} (\lambda - \lambda_0)^2` with ``d`` as in :class:`~.ldr_kl.LDRKL`. The best
    lambda solves :math:`\lambda = \lambda_0 (1 - KL(p \,\|\, 1/C) / (\alpha \log C))`, ``p = softmax(d / lambda)``, and
    lies in :math:`[\lambda_0 (1 - 1/\alpha), \lambda_0]`; it is a constant in backward. Two ways to find it:

    - with ``dataset_size``, as published: a table ``lambda_`` [dataset_size] (saved with the checkpoint) takes one
      step of that equation per visit of a sample. ``forward`` then needs ``index``; under ``torch.distributed`` every
      rank takes over the steps of all ranks. In eval mode, and for a negative index, lambda is ``lambda_0``;
    - without: ``iterations`` steps from ``lambda_0`` in every call, without state.

    When: label noise of unknown strength; noisy samples drift towards a flatter loss.

    Args:
        lambda_0: Largest lambda, > 0.
        alpha: Price of leaving ``lambda_0``, > 1; towards infinity the loss is LDR-KL at ``lambda_0``.
        margin: As in LDR-KL, >= 0.
        dataset_size: Number of training samples, for the table.
        normalize: As in LDR-KL. The official training uses ``l1``, optionally ``softplus_l1``.
        margin_in_kl: Whether ``p`` above counts the margin. False is the official code, which uses ``softmax(f /
            lambda)``; the derivation has the margin.
        floor: Lower bound of ``p``, which is then normalised again, in [0, 1); the official code takes 1e-5.
        iterations: Fixed-point steps of a call without a table, >= 1.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out; their lambda stays as it is.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    row_inputs = ("index",)

    lambda_: Tensor | None

    def __init__(
        self,
        lambda_0: float = 1.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        dataset_size: int | None = None,
        normalize: str = "none",
        margin_in_kl: bool = True,
        floor: float = 0.0,
        iterations: int = 5,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(lambda_0 > 0, "aldr_kl", "lambda_0", lambda_0, "> 0")
        check_parameter(alpha > 1, "aldr_kl", "alpha", alpha, "> 1, below it lambda may reach 0")
        check_parameter(margin >= 0, "aldr_kl", "margin", margin, ">= 0")
        check_parameter(
            dataset_size is None or dataset_size > 0, "aldr_kl", "dataset_size", dataset_size, "> 0 or None"
        )
        check_parameter(normalize in get_args(Normalize), "aldr_kl", "normalize", normalize, "none, l1 or softplus_l1")
        check_parameter(0 <= floor < 1, "aldr_kl", "floor", floor, "[0, 1)")
        check_parameter(iterations >= 1, "aldr_kl", "iterations", iterations, ">= 1")
        self.lambda_0, self.alpha, self.margin = lambda_0, alpha, margin
        self.normalize, self.margin_in_kl, self.floor, self.iterations = normalize, margin_in_kl, floor, iterations
        self.register_buffer("lambda_", None if dataset_size is None else torch.full((dataset_size,), float(lambda_0)))

    def forward(self, logits: Tensor, target: Tensor, *, index: Tensor | None = None, **options: Any) -> Tensor:
        """Computes the loss.

        Args:
            logits: [N, C, *] or [..., C].
            target: Class indices.
            index: Number of each sample in the training set, shape of ``target``; negative: none of them.
            options: As in :meth:`ClassificationLoss.forward`.

        Raises:
            LossplugError: ``index`` is missing in training with a table, doesn't fit, or was given without a table.
        """
        if self.lambda_ is None:
            if index is not None:
                raise LossplugError(
                    "index was given, but there is no table", where="aldr_kl", remedy="Set dataset_size"
                )
            return super().forward(logits, target, **options)
        if not self.training:
            return super().forward(logits, target, index=torch.full_like(target, -1), **options)
        index = check_index(index, target, self.lambda_.numel(), "aldr_kl")
        index = torch.where(self.kept(target, options.get("ignore_index")), index, -1)
        return super().forward(logits, target, index=index, **options)

    def rows(self, z: Tensor, y: Tensor, *, index: Tensor | None = None) -> Tensor:
        """Rows at the lambda of each sample."""
        classes = z.shape[1]
        if classes < 2:
            raise LossplugError("needs at least two classes", where="aldr_kl")
        f = normalize_scores(z, self.normalize)
        d = margin_differences(f, y, self.margin)
        with torch.no_grad():
            scores = d if self.margin_in_kl else f
            lambda_ = self._fixed_point(scores) if index is None else self._visit(scores, index)
        price = self.alpha * math.log(classes) / (2 * self.lambda_0)
        return ldr_kl(d, lambda_) - price * (lambda_ - self.lambda_0) ** 2

    def _step(self, scores: Tensor, lambda_: Tensor) -> Tensor:
        p = (scores / lambda_[:, None]).softmax(dim=1)
        if self.floor:
            p = p.clamp_min(self.floor)
            p = p / p.sum(dim=1, keepdim=True)
        log_c = math.log(scores.shape[1])
        kl = (log_c - torch.special.entr(p).sum(dim=1)).clamp(0, log_c)
        return self.lambda_0 * (1 - kl / (self.alpha * log_c))

    def _fixed_point(self, scores: Tensor) -> Tensor:
        lambda_ = scores.new_full((scores.shape[0],), self.lambda_0)
        for _ in range(self.iterations):
            lambda_ = self._step(scores, lambda_)
        return lambda_

    def _visit(self, scores: Tensor, index: Tensor) -> Tensor:
        """One step from the table for rows with an index; the table of every rank takes the steps of all."""
        start = scores.new_full((scores.shape[0],), self.lambda_0)
        if self.lambda_ is None or not self.training:
            return start
        seen = index >= 0
        start = torch.where(seen, self.lambda_[index.clamp_min(0)].to(start), start)
        lambda_ = torch.where(seen, self._step(scores, start), start)
        numbers, values = gather_rows(index, lambda_)
        numbers, values = numbers[numbers >= 0], values[numbers >= 0].to(self.lambda_)
        # A sample drawn twice in one step takes the smaller lambda, so that ranks agree whatever the order of writes.
        self.lambda_.scatter_reduce_(0, numbers, values, "amin", include_self=False)
        return lambda_
