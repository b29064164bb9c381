"""The channel-shrunk KV cache for transformers: calibrate once, then ``generate`` with a cache of a fifth."""

from lightning_lossplug.integrations.kv_cache.cache import ChannelShrunkCache, remove_cache_hooks
from lightning_lossplug.integrations.kv_cache.decode_mode import decode_mode
from lightning_lossplug.integrations.kv_cache.evaluation import decode_logits, decode_perplexity
from lightning_lossplug.kv_cache.files import load_kv_factors, save_kv_factors
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.shrink import record_moments, shrink_kv

__all__ = [
    "ChannelShrunkCache",
    "KVShrinkSettings",
    "decode_logits",
    "decode_mode",
    "decode_perplexity",
    "load_kv_factors",
    "record_moments",
    "remove_cache_hooks",
    "save_kv_factors",
    "shrink_kv",
]
