"""Losses of a linear head that never holds its logits."""

from lightning_lossplug.losses.fused.divergence import fused_linear_divergence
from lightning_lossplug.losses.fused.head import FusedHead, attach
from lightning_lossplug.losses.fused.lazy import LazyLogits, lazy_logits
from lightning_lossplug.losses.fused.linear import fused_linear
from lightning_lossplug.losses.fused.linear_cross_entropy import LinearCrossEntropy
from lightning_lossplug.losses.fused.tiles import linear_stats

__all__ = [
    "FusedHead",
    "LazyLogits",
    "LinearCrossEntropy",
    "attach",
    "fused_linear",
    "fused_linear_divergence",
    "lazy_logits",
    "linear_stats",
]
