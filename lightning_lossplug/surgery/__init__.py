"""Choosing layers, stacking weight transforms in the canonical order, folding them (and norms), wrapping methods."""

from lightning_lossplug.surgery.attention import (
    attending_layers,
    attention_of,
    find_attention,
    plug_attention,
    unplug_attention,
)
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method, wrapped_methods
from lightning_lossplug.surgery.fold_norm import fold_batch_norm
from lightning_lossplug.surgery.modes import evaluating
from lightning_lossplug.surgery.plug import (
    INPUT,
    STAGES,
    PluggedLayer,
    WeightTransform,
    fold,
    latent,
    plug,
    plug_input,
    plugged_layers,
    transform_of,
    unplug,
    unplug_input,
)
from lightning_lossplug.surgery.select import LAYER_KINDS, Candidate, LayerKind, Selection, candidates, select

__all__ = [
    "INPUT",
    "LAYER_KINDS",
    "STAGES",
    "Candidate",
    "LayerKind",
    "PluggedLayer",
    "Selection",
    "WeightTransform",
    "attending_layers",
    "attention_of",
    "candidates",
    "evaluating",
    "find_attention",
    "fold",
    "fold_batch_norm",
    "latent",
    "plug",
    "plug_attention",
    "plug_input",
    "plugged_layers",
    "select",
    "transform_of",
    "unplug",
    "unplug_attention",
    "unplug_input",
    "unwrap_method",
    "wrap_method",
    "wrapped_methods",
]
