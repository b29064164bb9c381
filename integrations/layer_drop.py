"""A smaller language model from some layers of a larger one, as DistilBERT starts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_lossplug.distillation.distilbert import spaced_layers
from lightning_lossplug.errors import LossplugError

WHERE = "drop_layers"


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns path and list of a transformers model's layers.

    Raises:
        LossplugError: None is as long as its configuration says, or several are.
    """
    config: Any = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise LossplugError(
            f"{type(model).__name__} has {len(found)} lists of {depth} layers",
            where=WHERE,
            remedy="It takes transformers models with one stack of layers",
        )
    return found[0]


def drop_layers(model: nn.Module, keep: int | Sequence[int]) -> Any:
    """Returns a copy of a transformers model with some of its layers; embeddings and head are kept.

    Args:
        model: A model with one stack of layers; it stays as it is.
        keep: How many, evenly spaced with the first and the last, or which (DistilBERT: 0, 2, 4, 7, 9, 11 of 12).

    Raises:
        LossplugError: Layers that aren't there, or a model of another kind.
    """
    path, layers = layer_list(model)
    chosen = spaced_layers(len(layers), keep) if isinstance(keep, int) else list(keep)
    if not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] < len(layers):
        raise LossplugError(
            f"layers {chosen} can't be taken from {len(layers)}", where=WHERE, remedy="Give rising numbers from 0 on"
        )
    twin: Any = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    kept = nn.ModuleList([twin.get_submodule(path)[i] for i in chosen])
    setattr(twin.get_submodule(parent), name, kept)
    for i, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i  # type: ignore[assignment] # where the cache keeps its keys and values
    twin.config.num_hidden_layers = len(chosen)
    types = getattr(twin.config, "layer_types", None)
    if isinstance(types, (list, tuple)) and len(types) == len(layers):
        twin.config.layer_types = [types[i] for i in chosen]
    return twin
