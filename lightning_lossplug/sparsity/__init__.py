"""N:M sparsity: masks, recipes, the technique, its health; sparse activations."""

from lightning_lossplug.sparsity.activation import DensityPenalty, density, find_activations
from lightning_lossplug.sparsity.activation_ppl import PPLSparsity, ppl_p_sparsity
from lightning_lossplug.sparsity.activation_threshold import ActivationThresholds
from lightning_lossplug.sparsity.health import LayerHealth, Settling, mean_health, nm_health
from lightning_lossplug.sparsity.nm_mask import nm_mask
from lightning_lossplug.sparsity.recipes import (
    NMSRSTE,
    NMSTE,
    MdGfExponential,
    MdGfLinear,
    NMOneShot,
    Recipe,
    SdGfGeometric,
    SdGfStepwise,
    StepState,
)
from lightning_lossplug.sparsity.ste import decayed_ste, masked_ste
from lightning_lossplug.sparsity.technique import NMSettings, NMTechnique

__all__ = [
    "NMSRSTE",
    "NMSTE",
    "ActivationThresholds",
    "DensityPenalty",
    "LayerHealth",
    "MdGfExponential",
    "MdGfLinear",
    "NMOneShot",
    "NMSettings",
    "NMTechnique",
    "PPLSparsity",
    "Recipe",
    "SdGfGeometric",
    "SdGfStepwise",
    "Settling",
    "StepState",
    "decayed_ste",
    "density",
    "find_activations",
    "masked_ste",
    "mean_health",
    "nm_health",
    "nm_mask",
    "ppl_p_sparsity",
]
