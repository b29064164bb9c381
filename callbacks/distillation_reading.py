"""Finding the classifier, the tensor of a tap, and what the registry knows of a loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lossplug.distillation.taps import Tap
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import registry


def classifier_path(network: nn.Module, where: str) -> str:
    """Returns the path of a network's classifier: timm's ``get_classifier``, else its last linear layer.

    Raises:
        LossplugError: It has none.
    """
    getter = getattr(network, "get_classifier", None)
    if callable(getter):
        head = getter()
        path = next((name for name, m in network.named_modules() if m is head), None)
        if path and isinstance(head, nn.Linear):
            return path
    linear = [name for name, m in network.named_modules() if isinstance(m, nn.Linear) and name]
    if not linear:
        raise LossplugError(f"{type(network).__name__} has no linear classifier", where=where)
    return linear[-1]


def tensor_of(tap: Tap) -> Tensor:
    """Returns what a tap read, or the first part of a sequence.

    Raises:
        LossplugError: It is no tensor.
    """
    value = tap.last().output
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(value, Tensor):
        raise LossplugError(f"{tap.path!r} gave {type(value).__name__}, expected a tensor", where=tap.where)
    return value


def facts(loss: nn.Module) -> dict[str, Any]:
    """Returns the facts a loss was registered with."""
    entry = next((e for e in registry if e.kind == "loss" and e.factory is type(loss)), None)
    return entry.facts if entry else {}
