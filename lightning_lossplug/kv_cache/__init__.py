"""Smaller KV caches: low-rank codes of old keys and values, few bits, exact recent tokens; plain PyTorch.

The cache for transformers' ``generate`` is :mod:`lightning_lossplug.integrations.kv_cache`.
"""

from lightning_lossplug.kv_cache.allocation import allocate_ranks, rank_of_ratio
from lightning_lossplug.kv_cache.bases import eigen_attention, matryoshka_kv
from lightning_lossplug.kv_cache.codes import code_bytes, dequantize_codes, quantize_codes
from lightning_lossplug.kv_cache.decode_mode import decode_mode
from lightning_lossplug.kv_cache.end_to_end import train_end_to_end
from lightning_lossplug.kv_cache.factors import (
    Factors,
    asvd_init,
    balanced,
    encoder_of,
    svd_init,
    whitened_init,
)
from lightning_lossplug.kv_cache.files import load_kv_factors, save_kv_factors
from lightning_lossplug.kv_cache.folding import folded_output
from lightning_lossplug.kv_cache.gradients import gradient_moments
from lightning_lossplug.kv_cache.moments import Moments
from lightning_lossplug.kv_cache.orthogonal import cayley, nested_ranks, principal_axes, ranks_of_threshold
from lightning_lossplug.kv_cache.plan import KVFactors, LayerFactors, fit_factors
from lightning_lossplug.kv_cache.recorder import MomentRecorder
from lightning_lossplug.kv_cache.residual import exact_tokens
from lightning_lossplug.kv_cache.rotary import Rotary
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.shrink import record_moments, shrink_kv
from lightning_lossplug.kv_cache.size import BranchSize, cache_bytes, dense_token_bytes, shrunk_token_bytes
from lightning_lossplug.kv_cache.streamed import stream_factors
from lightning_lossplug.kv_cache.training import gram_loss, reconstruction_loss, train_factors

__all__ = [
    "BranchSize",
    "Factors",
    "KVFactors",
    "KVShrinkSettings",
    "LayerFactors",
    "MomentRecorder",
    "Moments",
    "Rotary",
    "allocate_ranks",
    "asvd_init",
    "balanced",
    "cache_bytes",
    "cayley",
    "code_bytes",
    "decode_mode",
    "dense_token_bytes",
    "dequantize_codes",
    "eigen_attention",
    "encoder_of",
    "exact_tokens",
    "fit_factors",
    "folded_output",
    "gradient_moments",
    "gram_loss",
    "load_kv_factors",
    "matryoshka_kv",
    "nested_ranks",
    "principal_axes",
    "quantize_codes",
    "rank_of_ratio",
    "ranks_of_threshold",
    "reconstruction_loss",
    "record_moments",
    "save_kv_factors",
    "shrink_kv",
    "shrunk_token_bytes",
    "stream_factors",
    "svd_init",
    "train_end_to_end",
    "train_factors",
    "whitened_init",
]
