"""The cache that ``generate`` takes, and the hooks that bring it the rotary tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache.double_sparsity import DoubleSparsity
from lightning_lossplug.integrations.kv_cache.layer import ChannelShrunkLayer
from lightning_lossplug.integrations.kv_cache.sparse_layer import SparseShrunkLayer
from lightning_lossplug.kv_cache.attention import (
    AttentionBlock,
    block_input,
    key_validity,
    rotary_tables,
    sink_columns,
)
from lightning_lossplug.kv_cache.fingerprint import check_fingerprint
from lightning_lossplug.kv_cache.history import RotaryHistory
from lightning_lossplug.kv_cache.native import native_library
from lightning_lossplug.kv_cache.plan import KVFactors
from lightning_lossplug.kv_cache.size import cache_bytes
from lightning_lossplug.kv_cache.store import nbytes
from lightning_lossplug.kv_cache.triton_attention import has_triton, interpreted
from lightning_lossplug.losses.checks import check_choice

ATTENTIONS = ("auto", "native", "triton", "latent", "rebuild")
_HANDLES = "_lossplug_kv_hooks"


class ChannelShrunkCache(Cache):
    """A KV cache that keeps low-rank codes of old tokens and the exact keys and values of recent ones.

    ``model.generate(**inputs, past_key_values=ChannelShrunkCache(model, factors))``; everything else stays as it is.
    The prompt is processed exactly, its codes are read from the first generated token on; with chunked prefill or in
    a second turn the later part reads codes of the earlier one. At full rank it equals the stock cache. Layers with a
    sliding window or a state keep the cache transformers gives them. Under SDPA attention a decoding step reads the
    codes themselves; whatever else a model does with its keys and values gets them rebuilt, one layer at a time, which
    saves memory and not time. Assisted decoding is refused, since codes can't be taken back. (After CSKV, arXiv
    2409.10593, with codes of keys instead of hidden states.)

    Making one puts hooks on the model's attention blocks, once; they do nothing for other caches, and
    :func:`remove_cache_hooks` takes them off.

    Args:
        model: The model.
        factors: Its factors (:func:`shrink_kv`, :func:`load_kv_factors`).
        window: Recent tokens kept exactly, the current one among them; None: as the factors' settings say.
        attention: How a step attends to codes. ``native``: in C++, compiled at first use, on CPUs. ``triton``: by a
            kernel on GPUs, compared with PyTorch at its first use. ``latent``: in PyTorch. ``auto``: in C++ or by the
            kernel where that can be, else in PyTorch. ``rebuild``: by all keys and values rebuilt.
        sparse: Label channels (:func:`double_sparsity`): a step of one token reads the codes of k tokens only, in
            PyTorch, where ``attention`` is not ``rebuild``; labels are kept beside the codes. None: all tokens.

    Raises:
        LossplugError: The factors or the labels are of another model, the window is below 1, the attention
            implementation keeps a cache of its own (paged, flex), or ``native`` or ``triton`` is asked for where it
            can't be.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: KVFactors,
        window: int | None = None,
        attention: Literal["auto", "native", "triton", "latent", "rebuild"] = "auto",
        sparse: DoubleSparsity | None = None,
    ) -> None:
        self.blocks = factors.check(model)
        if sparse is not None:
            check_fingerprint(sparse.fingerprint, model, self.blocks)
        self.factors = factors
        self.window = factors.settings.window if window is None else window
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise LossplugError(f"window is {window!r}, allowed are whole numbers from 1", where="ChannelShrunkCache")
        settings = dataclasses.replace(factors.settings, window=self.window)
        check_choice("ChannelShrunkCache", "attention", attention, ATTENTIONS)
        if attention == "native" and isinstance(native := native_library(), str):
            raise LossplugError(
                f"the C++ attention can't be used: {native}", where="ChannelShrunkCache", remedy="attention='latent'"
            )
        if attention == "triton":
            _check_triton(next(iter(model.parameters())).device)
        config = next(iter(self.blocks.values())).module.config
        _check_attention(config)
        layers = []
        for index, (kind, arguments) in enumerate(zip(*get_layer_types_and_kwargs(config), strict=True)):
            if index in self.blocks:
                rotary = self.blocks[index].rotary
                own = (factors.layers[index], rotary, settings, attention)
                if sparse is None or index not in sparse.channels:
                    layers.append(ChannelShrunkLayer(*own))
                else:
                    labels = {"count": sparse.tokens, "bits": sparse.label_bits}
                    layers.append(SparseShrunkLayer(*own, channels=sparse.channels[index], **labels))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments))
        super().__init__(layers=layers)
        self.histories: list[RotaryHistory] = []
        self.sink_columns: Tensor | None = None
        attach_cache_hooks(model, self.blocks)

    def shrunk_layers(self) -> dict[int, ChannelShrunkLayer]:
        """Returns the layers that keep codes."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, ChannelShrunkLayer)}

    def announce(self, index: int, cos: Tensor, sin: Tensor, mask: Any, batch: int) -> None:
        """Keeps the tables of the tokens that a layer is about to add, and where its rows begin; called by the hook."""
        layer = self.layers[index]
        tokens = cos.shape[1]
        sinks = self.factors.settings.sinks
        if layer.seen == 0 and sinks and self.sink_columns is None:
            self.sink_columns = sink_columns(key_validity(mask, batch, tokens), sinks, batch, tokens, cos.device)
        history = layer.history
        if history is None:
            fitting = (h for h in self.histories if len(h) == layer.seen + tokens and h.same(cos))
            history = next(fitting, None)
            if history is None:
                history = RotaryHistory()
                self.histories.append(history)
        if len(history) == layer.seen:
            history.append(cos, sin)
        layer.announce(history, self.sink_columns, tokens)

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        self.histories.clear()
        self.sink_columns = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._apply(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        super().batch_repeat_interleave(repeats)
        self._apply(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        super().batch_select_indices(indices)
        self._apply(lambda t: t[indices])

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        for history in self.histories:
            history.apply(function)
        if self.sink_columns is not None:
            self.sink_columns = function(self.sink_columns)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, as long as they are exact."""
        super().crop(tokens_to_remove)
        for history in self.histories:
            if len(history) and tokens_to_remove:
                history.crop(len(history) - abs(tokens_to_remove))

    def activate_past_recording(self) -> None:
        """Called by assisted decoding, which takes tokens back.

        Raises:
            LossplugError: Always: tokens that are coded can't be taken back.
        """
        raise LossplugError(
            "assisted decoding takes tokens back, which a cache of codes can't",
            where="ChannelShrunkCache",
            remedy="Generate without an assistant, or without this cache",
        )

    def nbytes(self) -> int:
        """Returns the bytes of the live tensors of the shrunk layers and of the rotary tables."""
        shared = sum(nbytes(*history.tables.pages) for history in self.histories) + nbytes(self.sink_columns)
        return shared + sum(layer.nbytes() for layer in self.shrunk_layers().values())

    def expected_bytes(self) -> int:
        """Returns the same by formula (:func:`lightning_lossplug.kv_cache.cache_bytes`)."""
        layers = [layer for layer in self.shrunk_layers().values() if layer.is_initialized]
        if not layers:
            return 0
        element_bytes = layers[0].keys.element_size()
        rotary = sum(history.token_bytes() for history in self.histories)
        labels = sum(layer.labels.nbytes for layer in layers if getattr(layer, "labels", None) is not None)
        return labels + cache_bytes(
            self.factors.branches(),
            layers[0].seen,
            layers[0].exact,
            element_bytes,
            batch=layers[0].keys.shape[0],
            rotary=rotary,
            sinks=0 if self.sink_columns is None else self.sink_columns.shape[1],
        )


def attach_cache_hooks(model: nn.Module, blocks: dict[int, AttentionBlock]) -> None:
    """Puts the hooks on a model's attention blocks, unless they are there."""
    for block in blocks.values():
        if _HANDLES not in vars(block.module):
            hook = partial(_announce, block.index, block.cache, block.path)
            handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
            vars(block.module)[_HANDLES] = handle


def remove_cache_hooks(model: nn.Module) -> None:
    """Takes the hooks off again; caches made before raise when they are used."""
    for module in model.modules():
        handle: RemovableHandle | None = vars(module).pop(_HANDLES, None)
        if handle is not None:
            handle.remove()


def _announce(
    index: int, argument: str, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    cache = kwargs.get(argument)
    if isinstance(cache, ChannelShrunkCache):
        cos, sin = rotary_tables(cache.blocks[index], kwargs)
        batch, tokens = block_input(args, kwargs).shape[:2]
        if cos.shape[1] != tokens:
            raise LossplugError(f"{cos.shape[1]} rotary tables for {tokens} tokens", where=path)
        cache.announce(index, cos, sin, kwargs.get("attention_mask"), batch)


def _check_triton(device: torch.device) -> None:
    if not has_triton():
        reason = "Triton is not installed"
    elif device.type != "cuda" and not interpreted():
        reason = f"the model is on the device {device}, not on a GPU"
    else:
        return
    raise LossplugError(
        f"the Triton attention can't be used: {reason}", where="ChannelShrunkCache", remedy="attention='auto'"
    )


def _check_attention(config: Any) -> None:
    name = str(getattr(config, "_attn_implementation", None) or "eager")
    if name.startswith("paged") or name == "flex_attention":
        raise LossplugError(
            f"the attention implementation {name!r} is not supported",
            where="ChannelShrunkCache",
            remedy="model.set_attn_implementation('sdpa'), 'eager' or 'flash_attention_2'",
        )
