"""Quantisation after training: rounding methods layer by layer, scale migration, bit allocation."""

from lightning_lossplug.quantization.post.adaround import (
    AdaRound,
    adaround,
    adaround_beta,
    adaround_init,
    adaround_regularizer,
    rectified_sigmoid,
)
from lightning_lossplug.quantization.post.gptq import GPTQ, gptq
from lightning_lossplug.quantization.post.layer import LayerProblem
from lightning_lossplug.quantization.post.lorc import LowRankError, lorc
from lightning_lossplug.quantization.post.method import RTN, PostTrainingMethod
from lightning_lossplug.quantization.post.run import LayerReport, PostTraining, quantize_post_training

__all__ = [
    "GPTQ",
    "RTN",
    "AdaRound",
    "LayerProblem",
    "LayerReport",
    "LowRankError",
    "PostTraining",
    "PostTrainingMethod",
    "adaround",
    "adaround_beta",
    "adaround_init",
    "adaround_regularizer",
    "gptq",
    "lorc",
    "quantize_post_training",
    "rectified_sigmoid",
]
