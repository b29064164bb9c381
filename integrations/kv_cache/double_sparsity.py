"""Double Sparsity for transformers: a full cache of which every decoding step reads a few tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache.movable import MovableLayer
from lightning_lossplug.integrations.kv_cache.states import Pending, ShrunkStates
from lightning_lossplug.kv_cache.attention import (
    AttentionBlock,
    Tap,
    attention_blocks,
    block_input,
    rotary_tables,
)
from lightning_lossplug.kv_cache.codes import check_bits
from lightning_lossplug.kv_cache.fingerprint import check_fingerprint, fingerprint
from lightning_lossplug.kv_cache.labels import (
    STATISTICS,
    chosen,
    label_channels,
    label_scores,
    round_labels,
    sparse_attention,
    take_labels,
)
from lightning_lossplug.kv_cache.shrink import run_batches
from lightning_lossplug.losses.checks import check_choice
from lightning_lossplug.untrusted import read_json, reading, replace_file, seal, unseal


@dataclass(frozen=True)
class DoubleSparsity:
    """Which channels of every layer's keys are its labels, and how they are used.

    Args:
        channels: By layer, int64 ``[key-value heads, r]``.
        tokens: Tokens k that a query reads, >= 1.
        label_bits: 16 (the dtype of the keys), 8, 4 or 2: what labels are rounded to.
        fingerprint: Of the model.
    """

    channels: dict[int, Tensor]
    tokens: int
    label_bits: int
    fingerprint: dict[str, Any]

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise LossplugError(f"tokens is {self.tokens!r}, allowed are whole numbers from 1", where="DoubleSparsity")
        check_bits("DoubleSparsity", self.label_bits)

    def save(self, path: str | Path) -> Path:
        """Writes the table as JSON."""
        plain = {**asdict(self), "channels": {str(i): table.tolist() for i, table in self.channels.items()}}
        replace_file(Path(path), (json.dumps(seal(plain)) + "\n").encode())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> DoubleSparsity:
        """Reads what :meth:`save` wrote.

        Raises:
            LossplugError: The file can't be read.
        """
        with reading(path, "the table"):
            plain = unseal(read_json(Path(path)), path)
            plain["channels"] = {int(i): _table(table, path) for i, table in plain["channels"].items()}
            return cls(**plain)


def _table(rows: Any, path: str | Path) -> Tensor:
    table = torch.tensor(rows)
    if table.dtype != torch.int64 or table.ndim != 2 or not bool((table >= 0).all()):
        raise LossplugError("a layer's channels are no table of whole numbers", where=str(path))
    return table


@torch.no_grad()
def double_sparsity(
    model: nn.Module,
    batches: Iterable[Any],
    channels: int = 16,
    tokens: int = 128,
    statistic: Literal["q", "k", "qk"] = "q",
    label_bits: int = 16,
    dense_layers: tuple[int, ...] = (0, 1),
) -> DoubleSparsity:
    """Finds the label channels of a model on some text.

    Per layer, key-value head and channel: the mean of ``|q|`` before rotation over the query heads of the group
    (``q``), of ``|k|`` before rotation (``k``), or of ``|q k|`` of the same token after it (``qk``). One set of
    channels serves all query heads of a group, so that the labels of a key are kept once. (arXiv 2408.07092, whose 1/16
    of the channels is 8 of 128; heads of 64 channels need 16 all the same.)

    Args:
        model: A decoder of transformers with SDPA attention.
        batches: int64 ``[B, T]`` token ids without padding.
        channels: Label channels r per head.
        tokens: Tokens k that a query reads.
        statistic: ``q``, ``k`` or ``qk``.
        label_bits: 16, 8, 4 or 2.
        dense_layers: Layers that go on reading everything.

    Raises:
        LossplugError: A value out of range, no layer left, or attention that isn't SDPA.
    """
    check_choice("double_sparsity", "statistic", statistic, STATISTICS)
    blocks = {i: b for i, b in attention_blocks(model).items() if i not in dense_layers}
    if not blocks:
        raise LossplugError("every layer is a dense layer", where="double_sparsity")
    sums: dict[int, Tensor] = {}
    handles = [
        block.module.register_forward_pre_hook(_watch(block, statistic, sums), with_kwargs=True)
        for block in blocks.values()
    ]
    try:
        run_batches(model, blocks, batches)
    finally:
        for handle in handles:
            handle.remove()
    if set(sums) != set(blocks):
        raise LossplugError(
            "the queries were not seen",
            where="double_sparsity",
            remedy="model.set_attn_implementation('sdpa'), and batches without padding",
        )
    table = {index: label_channels(total, channels) for index, total in sorted(sums.items())}
    return DoubleSparsity(table, tokens, label_bits, fingerprint(model, attention_blocks(model)))


def _watch(block: AttentionBlock, statistic: str, sums: dict[int, Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cos, sin = (table.float() for table in rotary_tables(block, kwargs))

        def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            def watch(query: Tensor) -> None:
                groups = query.shape[1] // keys.shape[1]
                own = keys.float().repeat_interleave(groups, dim=1)
                if statistic == "qk":
                    size = query.float() * own
                else:
                    size = block.rotary.unrotate(query.float() if statistic == "q" else own, cos, sin)
                by_head = size.abs().unflatten(1, (-1, groups)).sum(2).transpose(1, 2)  # [batch, tokens, heads, d]
                sums[block.index] = sums.get(block.index, 0.0) + by_head.flatten(0, 1).double().sum(0).cpu()

            return stand_ins(Pending(lambda *_: None, lambda: (keys, values), watch), keys, values)

        return args, {**kwargs, block.cache: Tap(see, kwargs.get(block.cache))}

    return hook


def stand_ins(pending: Pending, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what an attention function gets instead of all keys and values."""
    return ShrunkStates(pending, 0, tuple(keys.shape), keys), ShrunkStates(pending, 1, tuple(values.shape), values)


class LabelledLayer(MovableLayer):
    """A full cache layer with the label channels of its keys beside it.

    Args:
        channels: int64 ``[heads, r]``.
        count: Tokens that a query reads.
        bits: Of the labels.
    """

    is_compileable = False

    def __init__(self, channels: Tensor, count: int, bits: int) -> None:
        super().__init__()
        self.channels, self.count, self.bits = channels, count, bits
        self.labels: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new tokens; a single one reads only the tokens that its labels choose."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.channels = self.channels.to(keys.device)
        new = round_labels(take_labels(key_states, self.channels), self.bits)
        self.labels = new if self.labels is None else torch.cat([self.labels, new], dim=2)
        if key_states.shape[2] > 1 or keys.shape[2] <= self.count:
            return keys, values
        return stand_ins(
            Pending(partial(self._attend, self.labels, keys, values), lambda: (keys, values)), keys, values
        )

    def _attend(
        self, labels: Tensor, keys: Tensor, values: Tensor, query: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        scores = label_scores(query, labels, self.channels, self.bits, mask)
        return sparse_attention(query, keys, values, scores, self.count, scale, mask)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._apply(function)
        if self.labels is not None:
            self.labels = function(self.labels)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.labels is not None:
            self.labels = self.labels[:, :, : -abs(tokens_to_remove)]

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        self.labels = None


class DoubleSparsityCache(Cache):
    """A cache for ``generate`` whose decoding steps read k tokens each, chosen by the labels of their keys.

    Nothing is thrown away, so memory grows by the labels; what shrinks is the number of keys and values that a step
    reads. Prompts are processed densely. Under SDPA attention only; other attention functions read everything.

    Args:
        model: The model.
        table: From :func:`double_sparsity`.

    Raises:
        LossplugError: The table is of another model.
    """

    def __init__(self, model: nn.Module, table: DoubleSparsity) -> None:
        blocks = attention_blocks(model)
        check_fingerprint(table.fingerprint, model, blocks)
        config = next(iter(blocks.values())).module.config
        layers = [
            LabelledLayer(table.channels[index], table.tokens, table.label_bits)
            if index in table.channels
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
            for index, (kind, arguments) in enumerate(zip(*get_layer_types_and_kwargs(config), strict=True))
        ]
        super().__init__(layers=layers)


@contextmanager
def double_sparsity_mode(model: nn.Module, table: DoubleSparsity, prefill: int) -> Iterator[nn.Module]:
    """Makes forward passes behave as if all tokens from ``prefill`` on were decoded with the sparse cache.

    Args:
        model: A decoder with SDPA attention; texts without padding.
        table: From :func:`double_sparsity`.
        prefill: Tokens of the prompt, >= 1.
    """
    blocks = attention_blocks(model)
    check_fingerprint(table.fingerprint, model, blocks)
    handles = [
        blocks[index].module.register_forward_pre_hook(_sparse(blocks[index], table, prefill), with_kwargs=True)
        for index in table.channels
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _sparse(block: AttentionBlock, table: DoubleSparsity, prefill: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = block_input(args, kwargs).shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=block_input(args, kwargs).device).tril()

        def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            channels = table.channels[block.index].to(keys.device)
            labels = round_labels(take_labels(keys, channels), table.label_bits)

            def attend(query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
                groups = query.shape[2] // tokens
                allowed = causal.repeat(groups, 1)
                scores = label_scores(query, labels, channels, table.label_bits)
                scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
                keep = chosen(scores, table.tokens) & allowed
                keep |= allowed & (torch.arange(tokens, device=keys.device) < prefill).repeat(groups)[:, None]
                return nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=keep, scale=scale)

            return stand_ins(Pending(attend, lambda: (keys, values), rows=None), keys, values)

        return args, {**kwargs, block.cache: Tap(see, None), "attention_mask": None}

    return hook
