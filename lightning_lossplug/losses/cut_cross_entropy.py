"""Cross-entropy of a linear classifier by cut-cross-entropy; registered where the package is installed."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_lossplug.losses.fused.linear_cross_entropy import LinearCrossEntropy
from lightning_lossplug.registry import register


@register(
    "loss",
    "cut_cross_entropy",
    family="adapter",
    paper="Cut Your Losses in Large-Vocabulary Language Models",
    arxiv="2411.09009",
    aliases=("cce",),
    signature="hidden_classifier",
)
class CutCrossEntropy(LinearCrossEntropy):
    """Cross-entropy of ``hidden @ head.T`` by the authors' package cut-cross-entropy (arXiv 2411.09009), on CUDA only.

    Called ``loss(hidden, head, target, bias)`` like ``linear_cross_entropy``; a bias only with versions that take one.
    When: fine-tuning with the least memory, or to compare with the own head.

    Args:
        softcap: c > 0 of ``c tanh(z / c)``; None: plain logits.
        filter_eps: Entries of the logits' gradient below it may be dropped; ``auto``: by the dtype; None: none are,
            which is what pre-training wants.
        weight: Class weights [V].
        ignore_index: Label of rows that are left out.
        reduction: ``mean`` or ``sum``.
    """

    def __init__(
        self,
        softcap: float | None = None,
        filter_eps: float | Literal["auto"] | None = None,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(0.0, softcap, 0.0, weight, ignore_index, reduction, backend="cce", filter_eps=filter_eps)
