"""Losses of a linear head that never holds its logits."""

from lightning_lossplug.losses.fused.linear import fused_linear
from lightning_lossplug.losses.fused.linear_cross_entropy import LinearCrossEntropy
from lightning_lossplug.losses.fused.tiles import linear_stats

__all__ = ["LinearCrossEntropy", "fused_linear", "linear_stats"]
