"""Choosing layers, stacking weight transforms in the canonical order, folding them away, wrapping methods."""

from lightning_lossplug.surgery.chain import unwrap_method, wrap_method, wrapped_methods
from lightning_lossplug.surgery.plug import (
    STAGES,
    PluggedLayer,
    WeightTransform,
    fold,
    latent,
    plug,
    plugged_layers,
    transform_of,
    unplug,
)
from lightning_lossplug.surgery.select import LAYER_KINDS, Candidate, LayerKind, Selection, candidates, select

__all__ = [
    "LAYER_KINDS",
    "STAGES",
    "Candidate",
    "LayerKind",
    "PluggedLayer",
    "Selection",
    "WeightTransform",
    "candidates",
    "fold",
    "latent",
    "plug",
    "plugged_layers",
    "select",
    "transform_of",
    "unplug",
    "unwrap_method",
    "wrap_method",
    "wrapped_methods",
]
