"""Losses by name: ``create("focal", gamma=2.0)(logits, target)``.

Every loss is one small file, registered under the name on its method card with the card's parameter names.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lightning_lossplug.losses.active_passive import ActivePassive
from lightning_lossplug.losses.adaface import AdaFace
from lightning_lossplug.losses.aldr_kl import ALDRKL
from lightning_lossplug.losses.align_uniform import AlignUniform
from lightning_lossplug.losses.amcl import AMCL
from lightning_lossplug.losses.arcface import ArcFace
from lightning_lossplug.losses.barlow_twins import BarlowTwins
from lightning_lossplug.losses.base import ClassificationLoss, FusableLoss, LabelError, Loss
from lightning_lossplug.losses.bias_loss import BiasLoss
from lightning_lossplug.losses.binary import BinaryLoss
from lightning_lossplug.losses.boxes import CIoU, DIoU
from lightning_lossplug.losses.cape import CaPE
from lightning_lossplug.losses.cauchy_schwarz import CauchySchwarzIB, CSDivergence
from lightning_lossplug.losses.ccl import CCL
from lightning_lossplug.losses.circle import Circle
from lightning_lossplug.losses.comp_sum import GCE, MAE, CompSum
from lightning_lossplug.losses.correctness_aware import CorrectnessAware, SampleTemperature
from lightning_lossplug.losses.cosface import CosFace
from lightning_lossplug.losses.cross_entropy import CrossEntropy
from lightning_lossplug.losses.decoupled_softmax import DecoupledSoftmax
from lightning_lossplug.losses.dice import Dice
from lightning_lossplug.losses.dist2 import Dist2
from lightning_lossplug.losses.eisl import EISL
from lightning_lossplug.losses.ensloss import EnsLoss
from lightning_lossplug.losses.expressive import CCIBP, MTLIBP, ExpIBP
from lightning_lossplug.losses.focal import Focal
from lightning_lossplug.losses.fused import LinearCrossEntropy, fused_linear
from lightning_lossplug.losses.ibp import IBP
from lightning_lossplug.losses.icnn import ICNN
from lightning_lossplug.losses.info_nce import InfoNCE
from lightning_lossplug.losses.jaccard_metric import JaccardMetric
from lightning_lossplug.losses.ldr_kl import LDRKL
from lightning_lossplug.losses.legendretron import LegendreTron
from lightning_lossplug.losses.lmse import LogMSE
from lightning_lossplug.losses.lse_penalty import LSEPenalty
from lightning_lossplug.losses.madl import GMADL, MADL
from lightning_lossplug.losses.moe_bias_balancing import MoEBiasBalancing
from lightning_lossplug.losses.normalised import NCE, NFL, NGCE, NMAE, NRCE, RCE
from lightning_lossplug.losses.nt_xent import NTXent, NTXentAM
from lightning_lossplug.losses.number_token import NumberToken
from lightning_lossplug.losses.poly_loss import PolyLoss
from lightning_lossplug.losses.proto_triplet import ProtoTriplet
from lightning_lossplug.losses.pseudo_huber import PseudoHuber
from lightning_lossplug.losses.siglip import SigLIP
from lightning_lossplug.losses.sigmoid_focal import SigmoidFocal
from lightning_lossplug.losses.sinkhorn import Sinkhorn
from lightning_lossplug.losses.smooth_adversarial import SmoothAdversarialCompSum
from lightning_lossplug.losses.soft_topk import SoftTopK
from lightning_lossplug.losses.speech import CTC, RNNT
from lightning_lossplug.losses.spherical import SphericalSoftmax, TaylorSoftmax
from lightning_lossplug.losses.spherical_output_layer import SphericalOutputLayer
from lightning_lossplug.losses.supcon import SupCon
from lightning_lossplug.losses.symmetric_ce import SymmetricCE
from lightning_lossplug.losses.symmetric_consistency import SymmetricConsistency
from lightning_lossplug.losses.tcm import TCM
from lightning_lossplug.losses.tiled_contrastive import TiledContrastive
from lightning_lossplug.losses.torch import TorchLoss
from lightning_lossplug.losses.w_mse import WMSE
from lightning_lossplug.losses.z_loss import ZLoss
from lightning_lossplug.registry import registry

# Adapters register themselves where their package is installed.
if find_spec("cut_cross_entropy") is not None:
    import lightning_lossplug.losses.cut_cross_entropy
if find_spec("liger_kernel") is not None:
    import lightning_lossplug.losses.liger
if find_spec("pytorch_metric_learning") is not None:
    import lightning_lossplug.losses.pml
if find_spec("timm") is not None:
    import lightning_lossplug.losses.timm
if find_spec("torchvision") is not None:
    import lightning_lossplug.losses.torchvision  # noqa: F401

__all__ = [
    "ALDRKL",
    "AMCL",
    "CCIBP",
    "CCL",
    "CTC",
    "EISL",
    "GCE",
    "GMADL",
    "IBP",
    "ICNN",
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
    "TCM",
    "WMSE",
    "ActivePassive",
    "AdaFace",
    "AlignUniform",
    "ArcFace",
    "BarlowTwins",
    "BiasLoss",
    "BinaryLoss",
    "CIoU",
    "CSDivergence",
    "CaPE",
    "CauchySchwarzIB",
    "Circle",
    "ClassificationLoss",
    "CompSum",
    "CorrectnessAware",
    "CosFace",
    "CrossEntropy",
    "DIoU",
    "DecoupledSoftmax",
    "Dice",
    "Dist2",
    "EnsLoss",
    "ExpIBP",
    "Focal",
    "FusableLoss",
    "InfoNCE",
    "JaccardMetric",
    "LSEPenalty",
    "LabelError",
    "LegendreTron",
    "LinearCrossEntropy",
    "LogMSE",
    "Loss",
    "MoEBiasBalancing",
    "NTXent",
    "NTXentAM",
    "NumberToken",
    "PolyLoss",
    "ProtoTriplet",
    "PseudoHuber",
    "SampleTemperature",
    "SigLIP",
    "SigmoidFocal",
    "Sinkhorn",
    "SmoothAdversarialCompSum",
    "SoftTopK",
    "SphericalOutputLayer",
    "SphericalSoftmax",
    "SupCon",
    "SymmetricCE",
    "SymmetricConsistency",
    "TaylorSoftmax",
    "TiledContrastive",
    "TorchLoss",
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
