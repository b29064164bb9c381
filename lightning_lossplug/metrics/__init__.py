"""Metrics of sparse weights and activations, for torchmetrics; the classes are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_lossplug.errors import require
from lightning_lossplug.metrics.counts import compliant_groups, stored_bytes, zeros
from lightning_lossplug.registry import register_path

__all__ = ["ActivationSparsity", "NMCompliance", "Sparsity", "compliant_groups", "stored_bytes", "zeros"]

_CLASSES = {"ActivationSparsity": "activations", "NMCompliance": "sparsity", "Sparsity": "sparsity"}

for _name in _CLASSES:
    register_path("metric", _name, f"{__name__}.{_name}", family="sparsity")


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("torchmetrics", "lightning", name)
    return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name]}"), name)
