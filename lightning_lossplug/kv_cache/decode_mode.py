"""What a shrunk cache does to the logits, measured in one forward pass instead of token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import (
    AttentionBlock,
    Tap,
    block_input,
    join_heads,
    key_validity,
    rotary_tables,
    sink_columns,
    split_heads,
)
from lightning_lossplug.kv_cache.plan import KVFactors, LayerFactors
from lightning_lossplug.kv_cache.residual import exact_tokens
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.store import CodeStore


@contextmanager
def decode_mode(
    model: nn.Module,
    factors: KVFactors,
    prefill: int,
    window: int | None = None,
    blocks: dict[int, AttentionBlock] | None = None,
    past: Mapping[int, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[nn.Module]:
    """Makes forward passes behave as if all tokens from ``prefill`` on were decoded one at a time.

    A row before ``prefill`` sees exact keys and values. Row t >= ``prefill`` sees the last ``window`` tokens (itself
    among them; or a block, as ``residual`` says) exactly and all older ones as their codes give them, which is what
    :class:`ChannelShrunkCache` does.
    Keys and values are given to the attention function twice, exact and rebuilt, and a mask picks one of the two, so
    any eager or SDPA attention works unchanged; a pass costs about twice the attention. Gradients reach the model, so
    that it can be fine-tuned for its shrunk cache, and the factors, if they want any.

    Args:
        model: The model; hooks are put on it for the block and taken off after it.
        factors: Its factors.
        prefill: Tokens of the prompt, >= 1.
        window: Recent tokens kept exactly; None: as the factors' settings say.
        blocks: The model's attention blocks, where its weights are known to fit the factors (they are being trained
            under them, say); None to check that.
        past: By layer, the rotary tables (cos, sin) of tokens that the model's stock cache holds already, exactly
            (:func:`exact_prefix`), so that a prompt is processed once for many factors; None where a pass is a whole
            text. The cache is not changed by the layers of the factors.

    Raises:
        LossplugError: The factors are of another model, ``prefill`` or ``window`` is below 1, or the attention
            implementation takes no mask of pairs.
    """
    blocks = factors.check(model) if blocks is None else blocks
    window = factors.settings.window if window is None else window
    if prefill < 1 or window < 1:
        raise LossplugError(
            f"prefill is {prefill} and window is {window}, both have to be at least 1", where="decode_mode"
        )
    name = getattr(next(iter(blocks.values())).module.config, "_attn_implementation", None) or "eager"
    if name not in ("eager", "sdpa"):
        raise LossplugError(
            f"the attention implementation {name!r} takes no mask of pairs",
            where="decode_mode",
            remedy="model.set_attn_implementation('sdpa')",
        )
    settings = dataclasses.replace(factors.settings, window=window)
    handles = []
    try:
        for index, block in blocks.items():
            layer = factors.layers[index]
            hook = _hook(block, layer, settings, prefill, None if past is None else past[index])
            handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    block: AttentionBlock,
    layer: LayerFactors,
    settings: KVShrinkSettings,
    prefill: int,
    past: tuple[Tensor, Tensor] | None,
) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cos, sin = rotary_tables(block, kwargs)
        if past is not None:
            cos, sin = (torch.cat(tables, dim=1) for tables in zip(past, (cos, sin), strict=True))

        def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            heads = keys.shape[1]
            if past is not None:
                held = kwargs[block.cache].layers[block.index]
                keys, values = torch.cat([held.keys, keys], dim=-2), torch.cat([held.values, values], dim=-2)
            plain = join_heads(block.rotary.unrotate(keys.float(), cos.float(), sin.float()))
            rebuilt = split_heads(through_codes(layer.keys, settings.k_bits, plain, keys.dtype), heads)
            old_keys = block.rotary.rotate(rebuilt, cos, sin).to(keys.dtype)
            old_values = split_heads(
                through_codes(layer.values, settings.v_bits, join_heads(values).float(), values.dtype), heads
            )
            return torch.cat([keys, old_keys], dim=-2), torch.cat([values, old_values], dim=-2)

        tokens = cos.shape[1]
        own = kwargs.get("attention_mask")
        batch = block_input(args, kwargs).shape[0]
        columns = sink_columns(
            key_validity(own, batch, tokens), min(settings.sinks, prefill), batch, tokens, cos.device
        )
        rows = block_input(args, kwargs).shape[1]
        mask = two_sided_mask(own, tokens, prefill, settings.window, columns, cos.dtype, settings.residual, rows)
        return args, {**kwargs, block.cache: Tap(see, None), "attention_mask": mask}

    return hook


def through_codes(factors: Any, bits: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Encodes and rebuilds, through the bits of a cache; a gradient passes straight through the rounding."""
    store = CodeStore(factors.rank, bits)
    codes = factors.to(x.device, torch.float32).code(x).to(dtype)
    store.append(codes.detach())
    kept = store.read(dtype)
    return factors.to(x.device, dtype).rebuild(codes + (kept - codes).detach() if codes.requires_grad else kept)


def two_sided_mask(
    mask: Tensor | None,
    tokens: int,
    prefill: int,
    window: int,
    sinks: Tensor,
    dtype: torch.dtype,
    residual: str = "sliding",
    rows: int | None = None,
) -> Tensor:
    """Returns the mask over exact and rebuilt keys, ``[batch, 1, rows, 2 * tokens]``, floating.

    Args:
        mask: The block's own mask, bool or floating ``[batch, 1, rows, tokens]``, or None for a causal one.
        tokens: Tokens of the text so far.
        prefill: Rows before it see exact keys only.
        window: Recent tokens that are exact.
        sinks: Columns of every row that are always exact, int64 ``[batch, sinks]``.
        dtype: Of the result.
        residual: Which recent tokens (:func:`exact_tokens`).
        rows: The last tokens, which the pass is of; None for all.

    Raises:
        LossplugError: The mask has another shape.
    """
    rows = tokens if rows is None else rows
    device, batch = sinks.device, len(sinks)
    query = torch.arange(tokens - rows, tokens, device=device)[:, None]
    key = torch.arange(tokens, device=device)
    is_sink = torch.zeros(batch, tokens, dtype=torch.bool, device=device).scatter_(1, sinks, True)
    old = key <= query - exact_tokens(query + 1, window, residual)
    coded = ((query >= prefill) & old) & ~is_sink[:, None, None]
    lowest = torch.finfo(dtype).min
    if mask is None:
        allowed = torch.zeros(1, 1, rows, tokens, dtype=dtype, device=device).masked_fill(key > query, lowest)
    elif mask.ndim != 4 or mask.shape[-1] != tokens:
        raise LossplugError(f"the attention mask has shape {list(mask.shape)}, expected pairs", where="decode_mode")
    else:
        mask = mask.to(device)
        is_bool = mask.dtype is torch.bool
        allowed = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest) if is_bool else mask.to(dtype)
    return torch.cat([allowed.masked_fill(coded, lowest), allowed.masked_fill(~coded, lowest)], dim=-1)
