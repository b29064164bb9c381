"""N:M sparsity: masks, scores, recipes, the technique, its health; sparse activations."""

from lightning_lossplug.sparsity.activation import DensityPenalty, density, find_activations
from lightning_lossplug.sparsity.activation_ppl import PPLSparsity, ppl_p_sparsity
from lightning_lossplug.sparsity.activation_threshold import ActivationThresholds
from lightning_lossplug.sparsity.bits import pack_rows, unpack_rows
from lightning_lossplug.sparsity.budget import search_patterns
from lightning_lossplug.sparsity.health import LayerHealth, Settling, mean_health, nm_health
from lightning_lossplug.sparsity.nm_apply import nm_apply
from lightning_lossplug.sparsity.nm_ast import NMAST, ASTAdamW, annealed_pull
from lightning_lossplug.sparsity.nm_bimask import NMBiMask, backward_mask, best_order, bimask_linear
from lightning_lossplug.sparsity.nm_cast import NMCAST, sign_decay_
from lightning_lossplug.sparsity.nm_mask import nm_mask
from lightning_lossplug.sparsity.nm_maskllm import NMMaskLLM, add_prior, nm_patterns, sampled_mask
from lightning_lossplug.sparsity.nm_sste import NMSSTE, rescale, soft_threshold
from lightning_lossplug.sparsity.nm_step import NMStep, STEPAdamW, variance_change
from lightning_lossplug.sparsity.nm_transposable import NMTSRSTE, NMTransposable
from lightning_lossplug.sparsity.oneshot import prune_nm
from lightning_lossplug.sparsity.permutation import permutation_search, permute_for_sparsity
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
from lightning_lossplug.sparsity.scores import gradient_scores, magnitude_scores, wanda_scores
from lightning_lossplug.sparsity.slorb import SLoRB, add_slorb, merge_slorb, slorb_output, slorb_start
from lightning_lossplug.sparsity.ste import decayed_ste, masked_ste
from lightning_lossplug.sparsity.technique import NMSettings, NMTechnique
from lightning_lossplug.sparsity.transposable import mvue24, tile_patterns, transposable_mask

__all__ = [
    "NMAST",
    "NMCAST",
    "NMSRSTE",
    "NMSSTE",
    "NMSTE",
    "NMTSRSTE",
    "ASTAdamW",
    "ActivationThresholds",
    "DensityPenalty",
    "LayerHealth",
    "MdGfExponential",
    "MdGfLinear",
    "NMBiMask",
    "NMMaskLLM",
    "NMOneShot",
    "NMSettings",
    "NMStep",
    "NMTechnique",
    "NMTransposable",
    "PPLSparsity",
    "Recipe",
    "SLoRB",
    "STEPAdamW",
    "SdGfGeometric",
    "SdGfStepwise",
    "Settling",
    "StepState",
    "add_prior",
    "add_slorb",
    "annealed_pull",
    "backward_mask",
    "best_order",
    "bimask_linear",
    "decayed_ste",
    "density",
    "find_activations",
    "gradient_scores",
    "magnitude_scores",
    "masked_ste",
    "mean_health",
    "merge_slorb",
    "mvue24",
    "nm_apply",
    "nm_health",
    "nm_mask",
    "nm_patterns",
    "pack_rows",
    "permutation_search",
    "permute_for_sparsity",
    "ppl_p_sparsity",
    "prune_nm",
    "rescale",
    "sampled_mask",
    "search_patterns",
    "sign_decay_",
    "slorb_output",
    "slorb_start",
    "soft_threshold",
    "tile_patterns",
    "transposable_mask",
    "unpack_rows",
    "variance_change",
    "wanda_scores",
]
