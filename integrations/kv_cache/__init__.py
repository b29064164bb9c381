"""The channel-shrunk KV cache for transformers: calibrate once, then ``generate`` with a cache of a fifth."""

from lightning_lossplug.integrations.kv_cache.cache import ChannelShrunkCache, remove_cache_hooks
from lightning_lossplug.integrations.kv_cache.distillation import distill_kv
from lightning_lossplug.integrations.kv_cache.double_sparsity import (
    DoubleSparsity,
    DoubleSparsityCache,
    double_sparsity,
    double_sparsity_mode,
)
from lightning_lossplug.integrations.kv_cache.evaluation import decode_logits, decode_perplexity, exact_prefix
from lightning_lossplug.integrations.kv_cache.kivi import KIVICache
from lightning_lossplug.integrations.kv_cache.plots import plot_kv_factors
from lightning_lossplug.integrations.kv_cache.retrieval import (
    RetrievalCase,
    key_value_case,
    passkey_case,
    retrieval_accuracy,
)
from lightning_lossplug.kv_cache.decode_mode import decode_mode
from lightning_lossplug.kv_cache.files import load_kv_factors, save_kv_factors
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.shrink import record_moments, shrink_kv

__all__ = [
    "ChannelShrunkCache",
    "DoubleSparsity",
    "DoubleSparsityCache",
    "KIVICache",
    "KVShrinkSettings",
    "RetrievalCase",
    "decode_logits",
    "decode_mode",
    "decode_perplexity",
    "distill_kv",
    "double_sparsity",
    "double_sparsity_mode",
    "exact_prefix",
    "key_value_case",
    "load_kv_factors",
    "passkey_case",
    "plot_kv_factors",
    "record_moments",
    "remove_cache_hooks",
    "retrieval_accuracy",
    "save_kv_factors",
    "shrink_kv",
]
