"""Metrics of compressed models, for torchmetrics; the classes are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_lossplug.errors import require
from lightning_lossplug.metrics.counts import compliant_groups, stored_bytes, zeros
from lightning_lossplug.registry import register_path

# name: module, family
_CLASSES = {
    "ActivationSparsity": ("activations", "sparsity"),
    "CapacityGap": ("capacity_gap", "distillation"),
    "DecodePerplexity": ("decode_perplexity", "kv_cache"),
    "NMCompliance": ("sparsity", "sparsity"),
    "Reliability": ("reliability", "distillation"),
    "Sparsity": ("sparsity", "sparsity"),
    "TeacherAgreement": ("agreement", "distillation"),
}

__all__ = [
    "ActivationSparsity",
    "CapacityGap",
    "DecodePerplexity",
    "NMCompliance",
    "Reliability",
    "Sparsity",
    "TeacherAgreement",
    "compliant_groups",
    "stored_bytes",
    "zeros",
]

for _name, (_, _family) in _CLASSES.items():
    register_path("metric", _name, f"{__name__}.{_name}", family=_family)


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("torchmetrics", "lightning", name)
    return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name][0]}"), name)
