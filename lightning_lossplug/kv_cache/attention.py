"""The attention blocks of a language model whose keys and values can be coded, found without importing its library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.rotary import Rotary, find_rotary

CACHE_ARGUMENTS = ("past_key_values", "layer_past")


@dataclass(frozen=True)
class AttentionBlock:
    """One attention block with full (not sliding) attention and rotary keys.

    Args:
        path: Its path in the model.
        module: The block.
        index: Its layer in the cache.
        cache: Name of the argument that takes the cache.
        rotary: How its keys are rotated.
    """

    path: str
    module: nn.Module
    index: int
    cache: str
    rotary: Rotary


def attention_blocks(model: nn.Module) -> dict[int, AttentionBlock]:
    """Returns the blocks whose part of the cache can be shrunk, by layer.

    Layers with a sliding window, with chunked attention, or that reuse another layer's keys keep their own cache and
    are left out.

    Raises:
        LossplugError: There is no such block, or a rotation is not known.
    """
    found: dict[int, AttentionBlock] = {}
    kinds: dict[str, int] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or "Attention" not in type(module).__name__:
            continue
        parameters = inspect.signature(module.forward).parameters
        cache = next((name for name in CACHE_ARGUMENTS if name in parameters), None)
        if cache is None:
            continue
        kind = layer_kind(module.config, index) if hasattr(module, "config") else "full_attention"
        kinds[kind] = kinds.get(kind, 0) + 1
        if kind != "full_attention":
            continue
        if "position_embeddings" not in parameters:
            raise LossplugError(
                f"{type(module).__name__} gets no rotary tables (position_embeddings)",
                where=path,
                remedy="The KV cache is shrunk for models with rotary keys",
            )
        if index in found:
            raise LossplugError(
                f"the layer {index} has two attention blocks, {found[index].path} and this one",
                where=path,
                remedy="Give one language model",
            )
        found[index] = AttentionBlock(path, module, index, cache, find_rotary(module, path))
    if not found:
        others = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        raise LossplugError(
            f"{type(model).__name__} has no layer with full attention and a cache" + (f", only {others}" * bool(kinds)),
            remedy="Give a decoder of transformers; layers with a sliding window have a bounded cache already",
        )
    return found


def layer_kind(config: Any, index: int) -> str:
    """Returns the kind of cache a layer has, as transformers tells it: ``full_attention``, ``sliding_attention`` ..."""
    kinds = getattr(config, "layer_types", None)
    sharing = getattr(config, "kv_sharing_modes", None)
    if sharing is not None and sharing[index] == "reuse":
        return "shared"
    if kinds is not None:
        return kinds[index]
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


def projection_weight(block: AttentionBlock, name: str) -> Tensor:
    """Returns the weight ``[h, c]`` of ``k_proj`` or ``v_proj``.

    Raises:
        LossplugError: The block has no such layer (a fused projection), or normalises keys after it.
    """
    layer = getattr(block.module, name, None)
    norms = ("k_norm", "k_layernorm", "key_layernorm")
    normed = name == "k_proj" and any(isinstance(getattr(block.module, n, None), nn.Module) for n in norms)
    if not isinstance(layer, nn.Linear) or normed:
        what = "normalises its keys" if normed else f"has no {name}"
        raise LossplugError(
            f"the block {what}, so there is no weight to decompose", where=block.path, remedy="Use init='whitened'"
        )
    return layer.weight.detach().T


def output_metric(block: AttentionBlock, width: int) -> Tensor | None:
    r"""Returns what an error of the values costs after the output projection, ``[c, c]``.

    :math:`M = \mathrm{diag}_h \sum_{g} W_O^{(h,g)} W_O^{(h,g)\top}` over the query heads g that read key-value head h.

    Args:
        block: The block.
        width: Channels c of all values of a token.

    Returns:
        The metric in float64, or None where the projection is not found (``o_proj``, ``dense``, ``out_proj``).
    """
    heads = output_heads(block, width)
    return None if heads is None else torch.block_diag(*torch.einsum("hgdo,hgeo->hde", heads, heads))


def output_heads(block: AttentionBlock, width: int) -> Tensor | None:
    """Returns the output projection by heads, float64 ``[key-value heads, query heads of each, d, hidden]``.

    None where it is not found (``o_proj``, ``dense``, ``out_proj``) or doesn't fit values of ``width`` channels.
    """
    names = ("o_proj", "dense", "out_proj")
    layer = next((m for m in (getattr(block.module, n, None) for n in names) if isinstance(m, nn.Linear)), None)
    size = getattr(block.module, "head_dim", getattr(block.module, "head_size", None))
    if layer is None or not isinstance(size, int) or width % size or layer.in_features % width:
        return None
    # query head h * groups + g reads key-value head h, as repeat_kv lays them out
    return layer.weight.detach().double().T.reshape(width // size, layer.in_features // width, size, -1)


def split_heads(flat: Tensor, heads: int) -> Tensor:
    """``[batch, tokens, heads * d]`` -> ``[batch, heads, tokens, d]``."""
    return flat.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """``[batch, heads, tokens, d]`` -> ``[batch, tokens, heads * d]``."""
    return states.transpose(1, 2).flatten(-2)


def key_validity(mask: Any, batch: int, tokens: int) -> Tensor | None:
    """Returns which keys are no padding, bool ``[batch, tokens]``, from the mask an attention block gets; None: all."""
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4:
        # the last query sees every key that is no padding, wherever the padding is
        row = mask[:, 0, -1, -tokens:]
        mask = row if row.dtype is torch.bool else row > torch.finfo(row.dtype).min / 2
    return mask[:, -tokens:].bool().expand(batch, tokens)


def sink_columns(valid: Tensor | None, sinks: int, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Returns the columns of the first tokens of every row that are no padding, int64 ``[batch, min(sinks, tokens)]``.

    Args:
        valid: Which tokens are no padding, bool ``[batch, tokens]``; None for all.
        sinks: How many.
        batch: Rows.
        tokens: Tokens of a row; a row that is shorter than ``sinks`` repeats its last column.
        device: Of the result.
    """
    first = torch.zeros(batch, dtype=torch.long, device=device) if valid is None else valid.int().argmax(1).to(device)
    columns = first[:, None] + torch.arange(min(sinks, tokens), device=device)
    return columns.clamp_max(tokens - 1)


def counted_tokens(mask: Any, batch: int, tokens: int, sinks: int, device: torch.device) -> Tensor | None:
    """Returns which tokens calibration counts, bool ``[batch, tokens]``: no padding and no sinks; None for all."""
    valid = key_validity(mask, batch, tokens)
    if not sinks:
        return valid
    columns = sink_columns(valid, sinks, batch, tokens, device)
    every = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    return (every if valid is None else valid.to(device)).scatter(1, columns, False)


class Tap:
    """Stands in for the cache of one attention block: hands keys and values to ``see``, then to the real cache.

    Args:
        see: ``see(keys, values) -> (keys, values)`` on what the block would store, ``[batch, heads, tokens, d]``.
        inner: The cache the model was called with, or None.
    """

    def __init__(self, see: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], inner: Any) -> None:
        self.see, self.inner = see, inner

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the block."""
        keys, values = self.see(keys, values)
        return (keys, values) if self.inner is None else self.inner.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the hidden states a block is called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def rotary_tables(block: AttentionBlock, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the tables (cos, sin) a block is called with, ``[batch or 1, tokens, rotary]``.

    Raises:
        LossplugError: It is called without them, or with something else.
    """
    tables = kwargs.get("position_embeddings")
    if not (isinstance(tables, tuple) and len(tables) == 2 and all(isinstance(table, Tensor) for table in tables)):
        raise LossplugError("the block is called without tables (cos, sin)", where=block.path)
    cos, sin = tables
    if cos.is_complex():
        raise LossplugError("the rotary tables are complex numbers, which is not known here", where=block.path)
    return (cos, sin) if cos.ndim == 3 else (cos[None], sin[None])
