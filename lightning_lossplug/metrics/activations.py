"""Share of activations that are zero, over any number of batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.metrics.sparsity import _Share


class ActivationSparsity(_Share):
    """Share of activations with ``|h| <= threshold``.

    With 0 it counts exact zeros, which ReLU has and GELU or SiLU hasn't. Update it from a forward hook, or with what a
    layer returns; it says what a kernel that skips zeros could leave out, not that anything runs faster.

    Args:
        threshold: >= 0.
        **options: Given to ``torchmetrics.Metric``.

    Raises:
        LossplugError: A negative threshold.
    """

    def __init__(self, threshold: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        if not threshold >= 0:
            raise LossplugError(f"threshold is {threshold}, allowed is >= 0", where="ActivationSparsity")
        self.threshold = threshold

    def update(self, h: Tensor, mask: Tensor | None = None) -> None:
        """Counts activations ``[..., d]``; ``mask`` of the shape without d says which tokens count."""
        small = h.detach().abs() <= self.threshold
        if mask is not None:
            small = small[mask.bool()]
        self.hits += small.count_nonzero()
        self.total += small.numel()
