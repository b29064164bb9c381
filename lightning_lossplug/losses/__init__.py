"""Losses by name: ``create("focal", gamma=2.0)(logits, target)``.

Every loss is one small file, registered under the name on its method card with the card's parameter names.
"""

from __future__ import annotations

from typing import Any

from lightning_lossplug.losses.aldr_kl import ALDRKL
from lightning_lossplug.losses.base import ClassificationLoss, FusableLoss, LabelError, Loss
from lightning_lossplug.losses.comp_sum import GCE, MAE, CompSum
from lightning_lossplug.losses.cross_entropy import CrossEntropy
from lightning_lossplug.losses.focal import Focal
from lightning_lossplug.losses.ldr_kl import LDRKL
from lightning_lossplug.losses.poly_loss import PolyLoss
from lightning_lossplug.losses.sigmoid_focal import SigmoidFocal
from lightning_lossplug.losses.z_loss import ZLoss
from lightning_lossplug.registry import registry

__all__ = [
    "ALDRKL",
    "GCE",
    "LDRKL",
    "MAE",
    "ClassificationLoss",
    "CompSum",
    "CrossEntropy",
    "Focal",
    "FusableLoss",
    "LabelError",
    "Loss",
    "PolyLoss",
    "SigmoidFocal",
    "ZLoss",
    "create",
]


def create(name: str, /, **parameters: Any) -> Loss:
    """Builds a loss from its registry name and the parameters on its card.

    Raises:
        LossplugError: Unknown name or parameter (with a suggestion), or a value out of range.
    """
    return registry.create("loss", name, **parameters)
