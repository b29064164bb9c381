"""Cross-entropy of a linear classifier by liger-kernel; registered where the package is installed."""

from __future__ import annotations

from torch import Tensor

from lightning_lossplug.losses.fused.linear_cross_entropy import LinearCrossEntropy
from lightning_lossplug.registry import register


@register(
    "loss",
    "liger",
    family="adapter",
    paper="Liger Kernel: Efficient Triton Kernels for LLM Training",
    arxiv="2410.10989",
    signature="hidden_classifier",
)
class LigerCrossEntropy(LinearCrossEntropy):
    """Cross-entropy of ``hidden @ head.T + bias`` by liger-kernel's Triton kernels (arXiv 2410.10989), on CUDA only.

    Called ``loss(hidden, head, target, bias)`` like ``linear_cross_entropy``; the gradient of the weight is summed in
    float32. When: to compare with the own head; ``fused_linear`` tries the package by itself on a GPU.

    Args:
        label_smoothing: In [0, 1]; not together with class weights.
        softcap: c > 0 of ``c tanh(z / c)``; None: plain logits.
        weight: Class weights [V].
        ignore_index: Label of rows that are left out.
        reduction: ``mean`` or ``sum``.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(label_smoothing, softcap, 0.0, weight, ignore_index, reduction, backend="liger")
