"""Quantisers by name: ``create("lsq", bits=4)(weight)``; each is a public function of tensors too.

Every quantiser is registered under the name on its method card with the card's parameter names.
"""

from __future__ import annotations

from typing import Any

from lightning_lossplug.quantization.adapt import adapt, gradient_diversity, push_down, push_up
from lightning_lossplug.quantization.affine import Affine
from lightning_lossplug.quantization.attention import AttentionQuant, binary_weights, explicit_attention
from lightning_lossplug.quantization.attention_bytes import integer_attention
from lightning_lossplug.quantization.base import Codes, Quantizer, paused
from lightning_lossplug.quantization.binary import (
    TBT,
    BinaryDM,
    BiPer,
    ReSTE,
    binarydm,
    biper,
    reste,
    reste_power,
    tbt,
)
from lightning_lossplug.quantization.bivit import BiViT, bivit, bivit_attention
from lightning_lossplug.quantization.denseshift import DenseShift, denseshift
from lightning_lossplug.quantization.dorefa import DoReFa, dorefa, dorefa_activation
from lightning_lossplug.quantization.dynamic import Dynamic, dynamic, dynamic_step
from lightning_lossplug.quantization.ewgs import EWGS, ewgs
from lightning_lossplug.quantization.formats import ELEMENTS, MX, NVFP4, FPQuant, fp_quant, mx, nvfp4, round_element
from lightning_lossplug.quantization.fp_advice import advise_fp_format, critical_tokens, fp_training_loss
from lightning_lossplug.quantization.gaqat import (
    GradientAdaptiveSettings,
    GradientAdaptiveTechnique,
    GradientGate,
    gradient_disorder,
)
from lightning_lossplug.quantization.grid import integer_range
from lightning_lossplug.quantization.groups import scale_groups, split_groups
from lightning_lossplug.quantization.int4 import Int4Linear, Int4Weight, int4_model, int4_weight
from lightning_lossplug.quantization.integer import integer_layer, integer_model
from lightning_lossplug.quantization.integer_fuse import fuse_layers
from lightning_lossplug.quantization.integer_layer import IntegerLayer
from lightning_lossplug.quantization.lsq import LSQ, lsq
from lightning_lossplug.quantization.lsq_plus import LSQPlus, lsq_plus
from lightning_lossplug.quantization.observers import (
    FakeQuant,
    affine_parameters,
    fake_quant,
    minmax_range,
    mse_range,
    percentile_range,
)
from lightning_lossplug.quantization.packing import bits_for, pack_codes, unpack_codes
from lightning_lossplug.quantization.pact import PACT, pact
from lightning_lossplug.quantization.paretoq import ParetoQ, paretoq
from lightning_lossplug.quantization.post import allocate_bits, migrate_outliers, quantize_post_training
from lightning_lossplug.quantization.self_compress import SelfCompress, self_compress
from lightning_lossplug.quantization.sparse_kernel import binary_kernels, sinkhorn, sparse_kernel_bnn
from lightning_lossplug.quantization.technique import QATSettings, QATTechnique
from lightning_lossplug.quantization.transform import QuantTransform
from lightning_lossplug.registry import registry

__all__ = [
    "ELEMENTS",
    "EWGS",
    "LSQ",
    "MX",
    "NVFP4",
    "PACT",
    "TBT",
    "Affine",
    "AttentionQuant",
    "BiPer",
    "BiViT",
    "BinaryDM",
    "Codes",
    "DenseShift",
    "DoReFa",
    "Dynamic",
    "FPQuant",
    "FakeQuant",
    "GradientAdaptiveSettings",
    "GradientAdaptiveTechnique",
    "GradientGate",
    "Int4Linear",
    "Int4Weight",
    "IntegerLayer",
    "LSQPlus",
    "ParetoQ",
    "QATSettings",
    "QATTechnique",
    "QuantTransform",
    "Quantizer",
    "ReSTE",
    "SelfCompress",
    "adapt",
    "advise_fp_format",
    "affine_parameters",
    "allocate_bits",
    "binary_kernels",
    "binary_weights",
    "binarydm",
    "biper",
    "bits_for",
    "bivit",
    "bivit_attention",
    "create",
    "critical_tokens",
    "denseshift",
    "dorefa",
    "dorefa_activation",
    "dynamic",
    "dynamic_step",
    "ewgs",
    "explicit_attention",
    "fake_quant",
    "fp_quant",
    "fp_training_loss",
    "fuse_layers",
    "gradient_disorder",
    "gradient_diversity",
    "int4_model",
    "int4_weight",
    "integer_attention",
    "integer_layer",
    "integer_model",
    "integer_range",
    "lsq",
    "lsq_plus",
    "migrate_outliers",
    "minmax_range",
    "mse_range",
    "mx",
    "nvfp4",
    "pack_codes",
    "pact",
    "paretoq",
    "paused",
    "percentile_range",
    "push_down",
    "push_up",
    "quantize_post_training",
    "reste",
    "reste_power",
    "round_element",
    "scale_groups",
    "self_compress",
    "sinkhorn",
    "sparse_kernel_bnn",
    "split_groups",
    "tbt",
    "unpack_codes",
]


def create(name: str, /, **parameters: Any) -> Quantizer:
    """Builds a quantiser from its registry name and the parameters on its card.

    Raises:
        LossplugError: Unknown name or parameter (with a suggestion), or a value out of range.
    """
    return registry.create("quantizer", name, **parameters)
