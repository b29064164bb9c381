"""Distillation: losses by name, ``create("kd", temperature=4.0)(student_logits, teacher_logits)``, and their runtime.

Every method is one small file under the name and with the parameter names of its card. A loss of logits takes
``(student, teacher, target=None)``; a loss of features takes one pair of features or two lists; an online method
returns the terms of all networks (:class:`OnlineTerms`). None contains the task loss, unless it says so.
"""

from __future__ import annotations

from typing import Any

from lightning_lossplug.distillation.abkd import ABKD, AKL, TVD, Jeffreys
from lightning_lossplug.distillation.arm_selfdistill import AdaptiveRelevanceMargin
from lightning_lossplug.distillation.at import AttentionTransfer
from lightning_lossplug.distillation.base import DistillationLoss, FeatureLoss, LogitLoss, OnlineLoss, OnlineTerms
from lightning_lossplug.distillation.bdkd import BDKD
from lightning_lossplug.distillation.ca_dino import GatedClusters, cluster_views, loss_gate
from lightning_lossplug.distillation.crd import CRD
from lightning_lossplug.distillation.dhkd import DHKD
from lightning_lossplug.distillation.dino import DINO
from lightning_lossplug.distillation.dist import DIST
from lightning_lossplug.distillation.distilbert import HiddenCosine, spaced_layers
from lightning_lossplug.distillation.distill_vq import DistillVQ, ProductQuantizer
from lightning_lossplug.distillation.dkd import DKD
from lightning_lossplug.distillation.dml import DML
from lightning_lossplug.distillation.entropic_student import EntropicStudent
from lightning_lossplug.distillation.faqd import FAQD
from lightning_lossplug.distillation.fitnet import FitNet
from lightning_lossplug.distillation.gkd import GKD, DistiLLM, MiniLLM
from lightning_lossplug.distillation.group_at import GroupAT
from lightning_lossplug.distillation.kd import KD
from lightning_lossplug.distillation.kdcl import KDCL
from lightning_lossplug.distillation.layer_pairs import pairs_by_depth
from lightning_lossplug.distillation.learned_layers import LearnedLayers
from lightning_lossplug.distillation.logit_std import LogitStd
from lightning_lossplug.distillation.makd import MAKD, aspects_of, narrow_classifier, widen_classifier
from lightning_lossplug.distillation.mcmi_teacher import MCMITeacher, class_centroids, conditional_mutual_information
from lightning_lossplug.distillation.mekd import MEKD
from lightning_lossplug.distillation.mft import MFT
from lightning_lossplug.distillation.mgsr import DACKL, Span
from lightning_lossplug.distillation.minillm import MiniLLMPolicy, length_normalised_advantages
from lightning_lossplug.distillation.mlkd import MLKD
from lightning_lossplug.distillation.ofd import OFD, negative_margin
from lightning_lossplug.distillation.on_policy import OnPolicy, correction_position
from lightning_lossplug.distillation.one import ONE
from lightning_lossplug.distillation.reviewkd import ReviewKD
from lightning_lossplug.distillation.rkd import RKD
from lightning_lossplug.distillation.sample_ids import Identified, content_ids
from lightning_lossplug.distillation.self_distill import (
    SelfDistill,
    ground_truth_weight,
    kernel_generations,
    kernel_limit,
)
from lightning_lossplug.distillation.spectral_kd import SpectralKD
from lightning_lossplug.distillation.switokd import SwitOKD
from lightning_lossplug.distillation.teacher_cache import CachedTeacher, StoredTop, cache_teacher
from lightning_lossplug.distillation.tleg import LinearExpansion, descendant, learngene
from lightning_lossplug.distillation.topk_logits import TopKLogits, top_logits
from lightning_lossplug.distillation.ttm import TTM, WTTM
from lightning_lossplug.distillation.two_gradients import DOT, align_gradients
from lightning_lossplug.distillation.uld import ULD
from lightning_lossplug.distillation.wad import WAD, class_means, labelled_fraction, pseudo_labels
from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.registry import registry

__all__ = [
    "ABKD",
    "AKL",
    "BDKD",
    "CRD",
    "DACKL",
    "DHKD",
    "DINO",
    "DIST",
    "DKD",
    "DML",
    "DOT",
    "FAQD",
    "GKD",
    "KD",
    "KDCL",
    "MAKD",
    "MEKD",
    "MFT",
    "MLKD",
    "OFD",
    "ONE",
    "RKD",
    "TTM",
    "TVD",
    "ULD",
    "WAD",
    "WTTM",
    "AdaptiveRelevanceMargin",
    "AttentionTransfer",
    "CachedTeacher",
    "DistiLLM",
    "DistillVQ",
    "DistillationLoss",
    "EntropicStudent",
    "FeatureLoss",
    "FitNet",
    "GatedClusters",
    "GroupAT",
    "HiddenCosine",
    "Identified",
    "Jeffreys",
    "LearnedLayers",
    "LinearExpansion",
    "LogitLoss",
    "LogitStd",
    "MCMITeacher",
    "MiniLLM",
    "MiniLLMPolicy",
    "OnPolicy",
    "OnlineLoss",
    "OnlineTerms",
    "ProductQuantizer",
    "ReviewKD",
    "SelfDistill",
    "Span",
    "SpectralKD",
    "StoredTop",
    "SwitOKD",
    "TopKLogits",
    "align_gradients",
    "aspects_of",
    "cache_teacher",
    "class_centroids",
    "class_means",
    "cluster_views",
    "conditional_mutual_information",
    "content_ids",
    "correction_position",
    "create",
    "descendant",
    "ground_truth_weight",
    "kernel_generations",
    "kernel_limit",
    "labelled_fraction",
    "learngene",
    "length_normalised_advantages",
    "loss_gate",
    "names",
    "narrow_classifier",
    "negative_margin",
    "pairs_by_depth",
    "pseudo_labels",
    "spaced_layers",
    "top_logits",
    "widen_classifier",
]


def names() -> list[str]:
    """Returns the names of the distillation losses."""
    return sorted(entry.name for entry in registry if entry.kind == "loss" and entry.family == "distillation")


def create(name: str, /, **parameters: Any) -> DistillationLoss:
    """Builds a distillation loss from its registry name and the parameters on its card.

    Raises:
        LossplugError: Unknown name or parameter (with a suggestion), or a value out of range.
    """
    known = {e.name: e.aliases for e in registry if e.kind == "loss" and e.family == "distillation"}
    if name not in known and not any(name in aliases for aliases in known.values()):
        raise LossplugError(f"there is no distillation loss {name!r}", remedy=suggestion(name, known))
    return registry.create("loss", name, **parameters)
