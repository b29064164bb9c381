"""Losses by name: ``create("focal", gamma=2.0)(logits, target)``.

Every loss is one small file, registered under the name on its method card with the card's parameter names.
"""

from __future__ import annotations

from typing import Any

from lightning_lossplug.losses.base import ClassificationLoss, FusableLoss, LabelError, Loss
from lightning_lossplug.losses.cross_entropy import CrossEntropy
from lightning_lossplug.losses.focal import Focal
from lightning_lossplug.losses.fused import LinearCrossEntropy, fused_linear
from lightning_lossplug.registry import registry

__all__ = [
    "ClassificationLoss",
    "CrossEntropy",
    "Focal",
    "FusableLoss",
    "LabelError",
    "LinearCrossEntropy",
    "Loss",
    "create",
    "fused_linear",
]


def create(name: str, /, **parameters: Any) -> Loss:
    """Builds a loss from its registry name and the parameters on its card.

    Raises:
        LossplugError: Unknown name or parameter (with a suggestion), or a value out of range.
    """
    return registry.create("loss", name, **parameters)
