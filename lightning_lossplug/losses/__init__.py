"""Losses by name: ``create("focal", gamma=2.0)(logits, target)``.

Every loss is one small file, registered under the name on its method card with the card's parameter names.
"""

from __future__ import annotations

from typing import Any

from lightning_lossplug.losses.active_passive import ActivePassive
from lightning_lossplug.losses.aldr_kl import ALDRKL
from lightning_lossplug.losses.base import ClassificationLoss, FusableLoss, LabelError, Loss
from lightning_lossplug.losses.bias_loss import BiasLoss
from lightning_lossplug.losses.binary import BinaryLoss
from lightning_lossplug.losses.cape import CaPE
from lightning_lossplug.losses.comp_sum import GCE, MAE, CompSum
from lightning_lossplug.losses.correctness_aware import CorrectnessAware, SampleTemperature
from lightning_lossplug.losses.cross_entropy import CrossEntropy
from lightning_lossplug.losses.ensloss import EnsLoss
from lightning_lossplug.losses.focal import Focal
from lightning_lossplug.losses.fused import LinearCrossEntropy, fused_linear
from lightning_lossplug.losses.ldr_kl import LDRKL
from lightning_lossplug.losses.legendretron import LegendreTron
from lightning_lossplug.losses.lse_penalty import LSEPenalty
from lightning_lossplug.losses.normalised import NCE, NFL, NGCE, NMAE, NRCE, RCE
from lightning_lossplug.losses.poly_loss import PolyLoss
from lightning_lossplug.losses.sigmoid_focal import SigmoidFocal
from lightning_lossplug.losses.smooth_adversarial import SmoothAdversarialCompSum
from lightning_lossplug.losses.spherical import SphericalSoftmax, TaylorSoftmax
from lightning_lossplug.losses.spherical_output_layer import SphericalOutputLayer
from lightning_lossplug.losses.symmetric_ce import SymmetricCE
from lightning_lossplug.losses.symmetric_consistency import SymmetricConsistency
from lightning_lossplug.losses.z_loss import ZLoss
from lightning_lossplug.registry import registry

__all__ = [
    "ALDRKL",
    "GCE",
    "LDRKL",
    "MAE",
    "NCE",
    "NFL",
    "NGCE",
    "NMAE",
    "NRCE",
    "RCE",
    "ActivePassive",
    "BiasLoss",
    "BinaryLoss",
    "CaPE",
    "ClassificationLoss",
    "CompSum",
    "CorrectnessAware",
    "CrossEntropy",
    "EnsLoss",
    "Focal",
    "FusableLoss",
    "LSEPenalty",
    "LabelError",
    "LegendreTron",
    "LinearCrossEntropy",
    "Loss",
    "PolyLoss",
    "SampleTemperature",
    "SigmoidFocal",
    "SmoothAdversarialCompSum",
    "SphericalOutputLayer",
    "SphericalSoftmax",
    "SymmetricCE",
    "SymmetricConsistency",
    "TaylorSoftmax",
    "ZLoss",
    "create",
    "fused_linear",
]


def create(name: str, /, **parameters: Any) -> Loss:
    """Builds a loss from its registry name and the parameters on its card.

    Raises:
        LossplugError: Unknown name or parameter (with a suggestion), or a value out of range.
    """
    return registry.create("loss", name, **parameters)
