"""Losses, sparsity, quantisation, distillation and small KV caches for any LightningModule, by callbacks.

The core (this package without ``callbacks`` and ``integrations``) is plain PyTorch. Sub-packages are imported when
they are first touched, so ``import lightning_lossplug`` costs little more than ``import torch``.
"""

import importlib
from types import ModuleType

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import registry

__version__ = "0.1.0"
__all__ = ["LossplugError", "__version__", "registry"]

_ROOMS = {
    "callbacks",
    "communication",
    "distillation",
    "export",
    "integrations",
    "kv_cache",
    "losses",
    "metrics",
    "quantization",
    "schedules",
    "sparsity",
    "surgery",
    "technique",
}


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
