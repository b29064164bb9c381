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
from lightning_lossplug.losses.boxes import CIoU, DIoU
from lightning_lossplug.losses.cape import CaPE
from lightning_lossplug.losses.cauchy_schwarz import CauchySchwarzIB, CSDivergence
from lightning_lossplug.losses.comp_sum import GCE, MAE, CompSum
from lightning_lossplug.losses.correctness_aware import CorrectnessAware, SampleTemperature
from lightning_lossplug.losses.cross_entropy import CrossEntropy
from lightning_lossplug.losses.dice import Dice
from lightning_lossplug.losses.dist2 import Dist2
from lightning_lossplug.losses.eisl import EISL
from lightning_lossplug.losses.ensloss import EnsLoss
from lightning_lossplug.losses.expressive import CCIBP, MTLIBP, ExpIBP
from lightning_lossplug.losses.focal import Focal
from lightning_lossplug.losses.ibp import IBP
from lightning_lossplug.losses.jaccard_metric import JaccardMetric
from lightning_lossplug.losses.ldr_kl import LDRKL
from lightning_lossplug.losses.legendretron import LegendreTron
from lightning_lossplug.losses.lmse import LogMSE
from lightning_lossplug.losses.lse_penalty import LSEPenalty
from lightning_lossplug.losses.madl import GMADL, MADL
from lightning_lossplug.losses.moe_bias_balancing import MoEBiasBalancing
from lightning_lossplug.losses.normalised import NCE, NFL, NGCE, NMAE, NRCE, RCE
from lightning_lossplug.losses.number_token import NumberToken
from lightning_lossplug.losses.poly_loss import PolyLoss
from lightning_lossplug.losses.pseudo_huber import PseudoHuber
from lightning_lossplug.losses.sigmoid_focal import SigmoidFocal
from lightning_lossplug.losses.sinkhorn import Sinkhorn
from lightning_lossplug.losses.smooth_adversarial import SmoothAdversarialCompSum
from lightning_lossplug.losses.speech import CTC, RNNT
from lightning_lossplug.losses.spherical import SphericalSoftmax, TaylorSoftmax
from lightning_lossplug.losses.spherical_output_layer import SphericalOutputLayer
from lightning_lossplug.losses.symmetric_ce import SymmetricCE
from lightning_lossplug.losses.symmetric_consistency import SymmetricConsistency
from lightning_lossplug.losses.z_loss import ZLoss
from lightning_lossplug.registry import registry

__all__ = [
    "ALDRKL",
    "CCIBP",
    "CTC",
    "EISL",
    "GCE",
    "GMADL",
    "IBP",
    "LDRKL",
    "MADL",
    "MAE",
    "MTLIBP",
    "NCE",
    "NFL",
    "NGCE",
    "NMAE",
    "NRCE",
    "RCE",
    "RNNT",
    "ActivePassive",
    "BiasLoss",
    "BinaryLoss",
    "CIoU",
    "CSDivergence",
    "CaPE",
    "CauchySchwarzIB",
    "ClassificationLoss",
    "CompSum",
    "CorrectnessAware",
    "CrossEntropy",
    "DIoU",
    "Dice",
    "Dist2",
    "EnsLoss",
    "ExpIBP",
    "Focal",
    "FusableLoss",
    "JaccardMetric",
    "LSEPenalty",
    "LabelError",
    "LegendreTron",
    "LogMSE",
    "Loss",
    "MoEBiasBalancing",
    "NumberToken",
    "PolyLoss",
    "PseudoHuber",
    "SampleTemperature",
    "SigmoidFocal",
    "Sinkhorn",
    "SmoothAdversarialCompSum",
    "SphericalOutputLayer",
    "SphericalSoftmax",
    "SymmetricCE",
    "SymmetricConsistency",
    "TaylorSoftmax",
    "ZLoss",
    "create",
]


def create(name: str, /, **parameters: Any) -> Loss:
    """Builds a loss from its registry name and the parameters on its card.

    Raises:
        LossplugError: Unknown name or parameter (with a suggestion), or a value out of range.
    """
    return registry.create("loss", name, **parameters)
