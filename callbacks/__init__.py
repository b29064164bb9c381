"""The Lightning layer: callbacks that bring the core's techniques to a Trainer.

Names are imported when they are first used; without Lightning installed they say which extra to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_lossplug.errors import require
from lightning_lossplug.registry import register_path

if TYPE_CHECKING:
    from lightning_lossplug.callbacks.activation_sparsity import ActivationDensity
    from lightning_lossplug.callbacks.checkpoint import dense_state_dict, load_dense, load_plugged, read_checkpoint
    from lightning_lossplug.callbacks.compressed_gradients import CompressedGradients
    from lightning_lossplug.callbacks.compressed_strategy import CompressedDDPStrategy
    from lightning_lossplug.callbacks.distillation import Distillation
    from lightning_lossplug.callbacks.distillation_report import DistillationReport, read_report
    from lightning_lossplug.callbacks.exact_resume import ExactResume
    from lightning_lossplug.callbacks.fake_quant_precision import FakeQuantPrecision
    from lightning_lossplug.callbacks.kv_channel_shrink import KVChannelShrink
    from lightning_lossplug.callbacks.local_updates import LocalUpdates
    from lightning_lossplug.callbacks.moe_balancing import MoEBalancing
    from lightning_lossplug.callbacks.nm_sparsity import NMSparsity
    from lightning_lossplug.callbacks.online_distillation import OnlineDistillation
    from lightning_lossplug.callbacks.qat import QAT
    from lightning_lossplug.callbacks.qat_gradient import GradientAdaptiveQAT
    from lightning_lossplug.callbacks.safe_checkpoints import SafeCheckpointIO
    from lightning_lossplug.callbacks.sam import SAM
    from lightning_lossplug.callbacks.self_distillation import SelfDistillation
    from lightning_lossplug.callbacks.sparsity_health import SparsityHealth, read_health
    from lightning_lossplug.callbacks.step_trace import StepTrace
    from lightning_lossplug.callbacks.swap_loss import SwapLoss
    from lightning_lossplug.callbacks.technique import TechniqueCallback

__all__ = [
    "QAT",
    "SAM",
    "ActivationDensity",
    "CompressedDDPStrategy",
    "CompressedGradients",
    "Distillation",
    "DistillationReport",
    "ExactResume",
    "FakeQuantPrecision",
    "GradientAdaptiveQAT",
    "KVChannelShrink",
    "LocalUpdates",
    "MoEBalancing",
    "NMSparsity",
    "OnlineDistillation",
    "SafeCheckpointIO",
    "SelfDistillation",
    "SparsityHealth",
    "StepTrace",
    "SwapLoss",
    "TechniqueCallback",
    "dense_state_dict",
    "load_dense",
    "load_plugged",
    "read_checkpoint",
    "read_health",
    "read_report",
]

_HOME = {
    "QAT": "qat",
    "SAM": "sam",
    "ActivationDensity": "activation_sparsity",
    "CompressedDDPStrategy": "compressed_strategy",
    "CompressedGradients": "compressed_gradients",
    "Distillation": "distillation",
    "DistillationReport": "distillation_report",
    "ExactResume": "exact_resume",
    "KVChannelShrink": "kv_channel_shrink",
    "LocalUpdates": "local_updates",
    "MoEBalancing": "moe_balancing",
    "GradientAdaptiveQAT": "qat_gradient",
    "NMSparsity": "nm_sparsity",
    "SparsityHealth": "sparsity_health",
    "OnlineDistillation": "online_distillation",
    "SelfDistillation": "self_distillation",
    "StepTrace": "step_trace",
    "SwapLoss": "swap_loss",
    "FakeQuantPrecision": "fake_quant_precision",
    "SafeCheckpointIO": "safe_checkpoints",
    "TechniqueCallback": "technique",
    "dense_state_dict": "checkpoint",
    "load_dense": "checkpoint",
    "load_plugged": "checkpoint",
    "read_checkpoint": "checkpoint",
    "read_health": "sparsity_health",
    "read_report": "distillation_report",
}

for _name, _family in {
    "CompressedGradients": "communication",
    "LocalUpdates": "communication",
    "ExactResume": "resume",
    "StepTrace": "reports",
    "KVChannelShrink": "kv_cache",
    "MoEBalancing": "loss",
    "NMSparsity": "sparsity",
    "SparsityHealth": "sparsity",
    "ActivationDensity": "sparsity",
    "SwapLoss": "loss",
    "SAM": "robustness",
    "QAT": "quantization",
    "GradientAdaptiveQAT": "quantization",
    "OnlineDistillation": "distillation",
    "Distillation": "distillation",
    "DistillationReport": "distillation",
    "SelfDistillation": "distillation",
}.items():
    register_path("callback", _name, f"{__name__}.{_HOME[_name]}.{_name}", family=_family)
register_path(
    "strategy", "lossplug_ddp", f"{__name__}.compressed_strategy.CompressedDDPStrategy", family="communication"
)
register_path(
    "plugin",
    "FakeQuantPrecision",
    f"{__name__}.fake_quant_precision.FakeQuantPrecision",
    family="quantization",
)
register_path("plugin", "SafeCheckpointIO", f"{__name__}.safe_checkpoints.SafeCheckpointIO", family="resume")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("lightning", "lightning", f"lightning_lossplug.callbacks.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
