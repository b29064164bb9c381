"""What a shrunk cache does to the logits, measured in one forward pass instead of token by token."""

from __future__ import annotations

from collections.abc import Iterator
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
from lightning_lossplug.kv_cache.store import CodeStore


@contextmanager
def decode_mode(
    model: nn.Module,
    factors: KVFactors,
    prefill: int,
    window: int | None = None,
    blocks: dict[int, AttentionBlock] | None = None,
) -> Iterator[nn.Module]:
    """Makes forward passes behave as if all tokens from ``prefill`` on were decoded one at a time.

    A row before ``prefill`` sees exact keys and values. Row t >= ``prefill`` sees the last ``window`` tokens (itself
    among them) exactly and all older ones as their codes give them, which is what :class:`ChannelShrunkCache` does.
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
    bits = (factors.settings.k_bits, factors.settings.v_bits)
    handles = []
    try:
        for index, block in blocks.items():
            layer = factors.layers[index]
            hook = _hook(block, layer, bits, prefill, window, factors.settings.sinks)
            handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    block: AttentionBlock, layer: LayerFactors, bits: tuple[int, int], prefill: int, window: int, sinks: int
) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cos, sin = rotary_tables(block, kwargs)

        def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            heads = keys.shape[1]
            plain = join_heads(block.rotary.unrotate(keys.float(), cos.float(), sin.float()))
            rebuilt = split_heads(_through(layer.keys, bits[0], plain, keys.dtype), heads)
            old_keys = block.rotary.rotate(rebuilt, cos, sin).to(keys.dtype)
            old_values = split_heads(_through(layer.values, bits[1], join_heads(values).float(), values.dtype), heads)
            return torch.cat([keys, old_keys], dim=-2), torch.cat([values, old_values], dim=-2)

        tokens = cos.shape[1]
        own = kwargs.get("attention_mask")
        batch = block_input(args, kwargs).shape[0]
        columns = sink_columns(key_validity(own, batch, tokens), min(sinks, prefill), batch, tokens, cos.device)
        mask = two_sided_mask(own, tokens, prefill, window, columns, cos.dtype)
        return args, {**kwargs, block.cache: Tap(see, None), "attention_mask": mask}

    return hook


def _through(factors: Any, bits: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Encodes and rebuilds, through the bits of a cache; a gradient passes straight through the rounding."""
    store = CodeStore(factors.rank, bits)
    codes = factors.to(x.device, torch.float32).code(x).to(dtype)
    store.append(codes.detach())
    kept = store.read(dtype)
    return factors.to(x.device, dtype).rebuild(codes + (kept - codes).detach() if codes.requires_grad else kept)


def two_sided_mask(
    mask: Tensor | None, tokens: int, prefill: int, window: int, sinks: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns the mask over exact and rebuilt keys, ``[batch, 1, tokens, 2 * tokens]``, floating.

    Args:
        mask: The block's own mask, bool or floating ``[batch, 1, tokens, tokens]``, or None for a causal one.
        tokens: Tokens of the pass.
        prefill: Rows before it see exact keys only.
        window: Recent tokens that are exact.
        sinks: Columns of every row that are always exact, int64 ``[batch, sinks]``.
        dtype: Of the result.

    Raises:
        LossplugError: The mask has another shape.
    """
    device, batch = sinks.device, len(sinks)
    query = torch.arange(tokens, device=device)[:, None]
    key = torch.arange(tokens, device=device)
    is_sink = torch.zeros(batch, tokens, dtype=torch.bool, device=device).scatter_(1, sinks, True)
    coded = ((query >= prefill) & (key <= query - window)) & ~is_sink[:, None, None]
    lowest = torch.finfo(dtype).min
    if mask is None:
        allowed = torch.zeros(1, 1, tokens, tokens, dtype=dtype, device=device).masked_fill(key > query, lowest)
    elif mask.ndim != 4 or mask.shape[-1] != tokens:
        raise LossplugError(f"the attention mask has shape {list(mask.shape)}, expected pairs", where="decode_mode")
    else:
        mask = mask.to(device)
        is_bool = mask.dtype is torch.bool
        allowed = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest) if is_bool else mask.to(dtype)
    return torch.cat([allowed.masked_fill(coded, lowest), allowed.masked_fill(~coded, lowest)], dim=-1)
