"""Cross-entropy with label smoothing, class weights, index or probability targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import FusableLoss
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register


@register(
    "loss",
    "cross_entropy",
    family="classification",
    paper="Rethinking the Inception Architecture for Computer Vision (label smoothing)",
    arxiv="1512.00567",
    signature="logits_index",
    soft=True,
    fusable=True,
)
class CrossEntropy(FusableLoss):
    r"""Cross-entropy, the same numbers as ``torch.nn.CrossEntropyLoss``.

    Index targets, with ``n = -log p_y``:
    :math:`l = (1-\epsilon)\, w_y n + \frac{\epsilon}{C} \sum_k w_k (-\log p_k)`; probability targets are mixed with the
    uniform distribution first. ``mean`` over index targets divides by the summed weights of the kept labels. The one
    difference: without a kept row the result is 0 with zero gradients, not NaN.

    When: the loss to beat; with smoothing of 0.05 to 0.2 where a large model is over-confident.

    Args:
        label_smoothing: :math:`\epsilon` in [0, 1].
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    accepts_soft = True

    def __init__(
        self,
        label_smoothing: float = 0.0,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        if not 0 <= label_smoothing <= 1:
            raise LossplugError(f"label_smoothing is {label_smoothing}, allowed is [0, 1]", where="cross_entropy")
        self.label_smoothing = label_smoothing
        self.needs = frozenset({"sum"}) if label_smoothing else frozenset()

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows of the unweighted loss; ``sum`` is needed only for the smoothing part."""
        nll = stats.lse - stats.target
        if self.label_smoothing == 0:
            return nll
        uniform = stats.lse - stats.needed("sum") / stats.classes
        return (1 - self.label_smoothing) * nll + self.label_smoothing * uniform

    def sum_weights(self, weight: Tensor | None) -> Tensor | None:
        """The smoothing part weighs every class."""
        return weight

    def weighted_from_stats(self, stats: LogitStats, y: Tensor, weight: Tensor | None) -> Tensor:
        """Rows with class weights, the smoothing part from the weighted sum of the logits."""
        if weight is None:
            return self.from_stats(stats)
        rows = (1 - self.label_smoothing) * weight[y] * (stats.lse - stats.target)
        if self.label_smoothing == 0:
            return rows
        return rows + self.label_smoothing / stats.classes * (weight.sum() * stats.lse - stats.needed("sum"))

    def weighted_rows(self, z: Tensor, y: Tensor, weight: Tensor | None, **row_inputs: Tensor) -> Tensor:
        """Rows of materialised logits: torch's own kernel."""
        return F.cross_entropy(z, y, weight, reduction="none", label_smoothing=self.label_smoothing)

    def weighted_soft_rows(self, z: Tensor, q: Tensor, weight: Tensor | None) -> Tensor:
        """``-sum_k w_k q_k log p_k`` with smoothed ``q``."""
        q = (1 - self.label_smoothing) * q + self.label_smoothing / z.shape[1]
        q = q if weight is None else q * weight
        return -torch.linalg.vecdot(q, z.log_softmax(dim=1))
