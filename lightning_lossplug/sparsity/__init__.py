"""N:M sparsity: masks, recipes, the technique."""

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
    "MdGfExponential",
    "MdGfLinear",
    "NMOneShot",
    "NMSettings",
    "NMTechnique",
    "Recipe",
    "SdGfGeometric",
    "SdGfStepwise",
    "StepState",
    "decayed_ste",
    "masked_ste",
    "nm_mask",
]
