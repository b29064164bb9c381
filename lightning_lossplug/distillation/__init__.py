"""Distillation: losses by name, ``create("kd", temperature=4.0)(student_logits, teacher_logits)``, and their runtime.

Every method is one small file under the name and with the parameter names of its card. A loss of logits takes
``(student, teacher, target=None)``; a loss of features takes one pair of features or two lists; an online method
returns the terms of all networks (:class:`OnlineTerms`). None contains the task loss, unless it says so.
"""

from __future__ import annotations

from typing import Any

from lightning_lossplug.distillation.abkd import ABKD, AKL, TVD, Jeffreys
from lightning_lossplug.distillation.at import AttentionTransfer
from lightning_lossplug.distillation.base import DistillationLoss, FeatureLoss, LogitLoss, OnlineLoss, OnlineTerms
from lightning_lossplug.distillation.bdkd import BDKD
from lightning_lossplug.distillation.dhkd import DHKD
from lightning_lossplug.distillation.dino import DINO
from lightning_lossplug.distillation.dist import DIST
from lightning_lossplug.distillation.distilbert import HiddenCosine, spaced_layers
from lightning_lossplug.distillation.dkd import DKD
from lightning_lossplug.distillation.dml import DML
from lightning_lossplug.distillation.fitnet import FitNet
from lightning_lossplug.distillation.gkd import GKD, DistiLLM, MiniLLM
from lightning_lossplug.distillation.kd import KD
from lightning_lossplug.distillation.kdcl import KDCL
from lightning_lossplug.distillation.logit_std import LogitStd
from lightning_lossplug.distillation.mlkd import MLKD
from lightning_lossplug.distillation.one import ONE
from lightning_lossplug.distillation.reviewkd import ReviewKD
from lightning_lossplug.distillation.rkd import RKD
from lightning_lossplug.distillation.switokd import SwitOKD
from lightning_lossplug.distillation.topk_logits import TopKLogits, top_logits
from lightning_lossplug.distillation.ttm import TTM, WTTM
from lightning_lossplug.distillation.two_gradients import DOT, align_gradients
from lightning_lossplug.distillation.uld import ULD
from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.registry import registry

__all__ = [
    "ABKD",
    "AKL",
    "BDKD",
    "DHKD",
    "DINO",
    "DIST",
    "DKD",
    "DML",
    "DOT",
    "GKD",
    "KD",
    "KDCL",
    "MLKD",
    "ONE",
    "RKD",
    "TTM",
    "TVD",
    "ULD",
    "WTTM",
    "AttentionTransfer",
    "DistiLLM",
    "DistillationLoss",
    "FeatureLoss",
    "FitNet",
    "HiddenCosine",
    "Jeffreys",
    "LogitLoss",
    "LogitStd",
    "MiniLLM",
    "OnlineLoss",
    "OnlineTerms",
    "ReviewKD",
    "SwitOKD",
    "TopKLogits",
    "align_gradients",
    "create",
    "names",
    "spaced_layers",
    "top_logits",
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
