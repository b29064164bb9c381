"""Quantisation after training: rounding methods layer by layer, scale migration, bit allocation."""

from lightning_lossplug.quantization.post.adaquant import AdaQuant, adaquant
from lightning_lossplug.quantization.post.adaround import (
    AdaRound,
    adaround,
    adaround_beta,
    adaround_init,
    adaround_regularizer,
    rectified_sigmoid,
)
from lightning_lossplug.quantization.post.allocate import allocate_bits, bit_alloc_ip, measure_degradation
from lightning_lossplug.quantization.post.fp_search import LLMFP4, exponent_bias, largest_value, preshifted_bias
from lightning_lossplug.quantization.post.gptq import GPTQ, gptq
from lightning_lossplug.quantization.post.l2 import entropy_bits, l2_bits, l2_decode, l2_encode, l2_round
from lightning_lossplug.quantization.post.layer import LayerProblem
from lightning_lossplug.quantization.post.lorc import LowRankError, lorc
from lightning_lossplug.quantization.post.method import RTN, PostTrainingMethod
from lightning_lossplug.quantization.post.migrate import Group, Migration, fold_scales, migrate_outliers
from lightning_lossplug.quantization.post.q_vlm import entropy_proxy, q_vlm_blocks, q_vlm_range
from lightning_lossplug.quantization.post.run import PostTraining, quantize_post_training
from lightning_lossplug.quantization.post.smoothing import (
    AWQ,
    OSPlus,
    SmoothQuant,
    awq,
    os_plus,
    os_plus_scale,
    os_plus_shift,
    smoothquant,
)
from lightning_lossplug.quantization.post.udfc import udfc_coefficients, udfc_prune, udfc_rescale
from lightning_lossplug.quantization.post.walk import LayerReport

__all__ = [
    "AWQ",
    "GPTQ",
    "LLMFP4",
    "RTN",
    "AdaQuant",
    "AdaRound",
    "Group",
    "LayerProblem",
    "LayerReport",
    "LowRankError",
    "Migration",
    "OSPlus",
    "PostTraining",
    "PostTrainingMethod",
    "SmoothQuant",
    "adaquant",
    "adaround",
    "adaround_beta",
    "adaround_init",
    "adaround_regularizer",
    "allocate_bits",
    "awq",
    "bit_alloc_ip",
    "entropy_bits",
    "entropy_proxy",
    "exponent_bias",
    "fold_scales",
    "gptq",
    "l2_bits",
    "l2_decode",
    "l2_encode",
    "l2_round",
    "largest_value",
    "lorc",
    "measure_degradation",
    "migrate_outliers",
    "os_plus",
    "os_plus_scale",
    "os_plus_shift",
    "preshifted_bias",
    "q_vlm_blocks",
    "q_vlm_range",
    "quantize_post_training",
    "rectified_sigmoid",
    "smoothquant",
    "udfc_coefficients",
    "udfc_prune",
    "udfc_rescale",
]
