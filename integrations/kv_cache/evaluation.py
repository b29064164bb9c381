"""Logits and perplexity under a shrunk cache."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import AttentionBlock, attention_blocks, rotary_tables
from lightning_lossplug.kv_cache.decode_mode import decode_mode
from lightning_lossplug.kv_cache.plan import KVFactors


@torch.no_grad()
def decode_logits(
    model: nn.Module, factors: KVFactors | None, input_ids: Tensor, prefill: int, window: int | None = None
) -> Tensor:
    """Returns the logits ``[B, T, V]`` of a text whose tokens from ``prefill`` on are decoded one at a time.

    Args:
        model: A decoder of transformers, in ``eval`` mode.
        factors: Of its shrunk cache; None for the dense cache.
        input_ids: int64 ``[B, T]``.
        prefill: Tokens processed at once, exactly; 1 to T.
        window: Recent tokens kept exactly; None: as the factors' settings say.

    Raises:
        LossplugError: ``prefill`` is not inside the text, or the factors are of another model.
    """
    if not 1 <= prefill <= input_ids.shape[1]:
        raise LossplugError(f"prefill is {prefill} in a text of {input_ids.shape[1]} tokens", where="decode_logits")
    input_ids = input_ids.to(next(iter(model.parameters())).device)
    if factors is None:
        return model(input_ids=input_ids, use_cache=False).logits
    with decode_mode(model, factors, prefill, window):
        return model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def exact_prefix(model: Any, input_ids: Tensor) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
    """Processes the prompt of a text once, for :func:`decode_mode` with many factors.

    ``with decode_mode(model, factors, prompt.shape[1], past=tables): model(input_ids=rest, past_key_values=cache)``,
    with a copy of the cache where the model has sliding layers, which go on with it.

    Args:
        model: A decoder of transformers, in ``eval`` mode.
        input_ids: The prompt, int64 ``[B, T]``, without padding.

    Returns:
        A stock cache, and the rotary tables of its tokens by layer.
    """
    from transformers import DynamicCache

    tables: dict[int, tuple[Tensor, Tensor]] = {}
    blocks = attention_blocks(model)

    def hook(block: AttentionBlock, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables[block.index] = rotary_tables(block, kwargs)

    handles = [b.module.register_forward_pre_hook(partial(hook, b), with_kwargs=True) for b in blocks.values()]
    cache = DynamicCache(config=model.config)
    try:
        model(input_ids=input_ids.to(next(iter(model.parameters())).device), past_key_values=cache)
    finally:
        for handle in handles:
            handle.remove()
    return cache, tables


def decode_perplexity(
    model: Any, factors: KVFactors | None, texts: Iterable[Tensor], prefill: int, window: int | None = None
) -> float:
    """Returns the perplexity of the tokens after ``prefill`` in texts of token ids, each ``[B, T]``.

    See :func:`decode_logits` for the arguments and :class:`lightning_lossplug.metrics.DecodePerplexity`.
    """
    from lightning_lossplug.metrics import DecodePerplexity

    metric = DecodePerplexity(prefill=prefill)
    for ids in texts:
        metric.update(decode_logits(model, factors, ids, prefill, window), ids)
    return float(metric.compute())
