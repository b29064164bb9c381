"""Attention over codes: values are never rebuilt, keys are rebuilt and rotated a page at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lossplug.kv_cache.factors import Factors
from lightning_lossplug.kv_cache.history import RotaryHistory
from lightning_lossplug.kv_cache.rotary import Pairing
from lightning_lossplug.kv_cache.store import CodeStore


@dataclass(frozen=True)
class LatentDecoders:
    """Decoders of one layer, by head, with the channels of keys in the order of their rotary pairs.

    Args:
        keys: ``[r_K, heads * d]``.
        key_mean: ``[heads * d]`` or None.
        values: ``[heads, r_V, d_V]``.
        value_mean: ``[heads, 1, d_V]`` or None.
        pairing: Which channels of a head rotate together.
    """

    keys: Tensor
    key_mean: Tensor | None
    values: Tensor
    value_mean: Tensor | None
    pairing: Pairing

    @classmethod
    def of(cls, keys: Factors, values: Factors, heads: int, pairing: Pairing) -> LatentDecoders:
        """Prepares the factors of a layer."""
        decode = keys.decode.unflatten(1, (heads, -1))[..., pairing.order].flatten(1).contiguous()
        mean = None if keys.mean is None else keys.mean.unflatten(0, (heads, -1))[..., pairing.order].flatten()
        value_mean = None if values.mean is None else values.mean.unflatten(0, (heads, 1, -1))
        return cls(decode, mean, values.decode.unflatten(1, (heads, -1)).transpose(0, 1), value_mean, pairing)

    @property
    def heads(self) -> int:
        """Key-value heads."""
        return self.values.shape[0]


@dataclass(frozen=True)
class LatentTokens:
    """Everything one layer of a cache holds: codes of old tokens, then exact recent ones.

    Args:
        decoders: Of the codes.
        key_codes: Codes of the unrotated keys of the old tokens.
        value_codes: Codes of their values.
        tables: Rotary tables of at least the old tokens.
        keys: Exact rotated keys of the recent tokens, ``[batch, heads, w, d]``.
        values: Their values.
        sinks: Columns ``[batch, s]`` of first tokens whose exact keys and values count instead of their codes, these
            keys and these values (``[batch, heads, s, d]``); or None. Columns don't fall, and may repeat.
    """

    decoders: LatentDecoders
    key_codes: CodeStore
    value_codes: CodeStore
    tables: RotaryHistory
    keys: Tensor
    values: Tensor
    sinks: tuple[Tensor, Tensor, Tensor] | None = None


def latent_attention(query: Tensor, tokens: LatentTokens, scale: float, mask: Tensor | None = None) -> Tensor:
    r"""Returns attention over old and recent tokens, without rebuilding values.

    With softmax weights p, ``out = (p_old Z_V) B_V + p_exact V``; scores of old tokens are
    :math:`q^\top \mathrm{rope}_t(z_t B_K)`, where keys are rebuilt by pages of 1024 tokens. Query heads that share a
    key-value head are rows of one product, so nothing is repeated. The same numbers as rebuilding everything, up to
    rounding.

    Args:
        query: Rotated queries, ``[batch, heads, rows, d]``: all rows that read a key-value head.
        tokens: What they attend to, T tokens.
        scale: Of the scores.
        mask: Added to the scores, ``[batch or 1, heads or 1, rows or 1, T]``; None for none.

    Returns:
        ``[batch, heads, rows, d_V]`` in the dtype of the query.
    """
    decoders, old = tokens.decoders, len(tokens.key_codes)
    query = query * scale
    turned = query[..., decoders.pairing.order]
    scores = [_page_scores(turned, tokens, index) for index in range(tokens.key_codes.pages)]
    scores.append(query @ tokens.keys.transpose(-1, -2))
    score = torch.cat(scores, dim=-1).float()
    if tokens.sinks is not None:
        columns, sink_keys, _ = tokens.sinks
        index = columns[:, None, None].expand(-1, *score.shape[1:3], -1)
        score.scatter_(3, index, (query @ sink_keys.transpose(-1, -2)).float())
    weights = (score if mask is None else score + mask).softmax(-1)
    exact = weights[..., old:].to(query.dtype) @ tokens.values
    coded = weights[..., :old]
    if tokens.sinks is not None:
        columns, _, sink_values = tokens.sinks
        once = columns < old  # of the others the recent tokens hold the exact values
        once[:, 1:] &= columns[:, 1:] != columns[:, :-1]
        share = weights.gather(3, index) * once[:, None, None]
        exact = exact + share.to(query.dtype) @ sink_values
        left = torch.ones(len(columns), weights.shape[-1], device=query.device).scatter_(1, columns, 0.0)
        coded = coded * left[:, None, None, :old]
    rebuilt = _weighted_codes(coded.to(query.dtype), tokens) @ decoders.values
    if decoders.value_mean is not None:
        rebuilt = rebuilt + coded.sum(-1, keepdim=True).to(query.dtype) * decoders.value_mean
    return exact + rebuilt


def _page_scores(turned: Tensor, tokens: LatentTokens, index: int) -> Tensor:
    """Scores ``[batch, heads, rows, tokens of the page]``."""
    decoders = tokens.decoders
    codes = tokens.key_codes.page(index, turned.dtype)
    flat = codes.reshape(-1, codes.shape[-1])
    mean = decoders.key_mean
    keys = flat @ decoders.keys if mean is None else torch.addmm(mean, flat, decoders.keys)
    keys = keys.view(*codes.shape[:2], decoders.heads, -1)
    keys = decoders.pairing.turn(keys, *tokens.tables.page(index, codes.shape[1]))
    return turned @ keys.permute(0, 2, 3, 1)


def _weighted_codes(weights: Tensor, tokens: LatentTokens) -> Tensor:
    """Sums of value codes, ``[batch, heads, rows, r_V]``."""
    start, total = 0, weights.new_zeros(())
    for index in range(tokens.value_codes.pages):
        codes = tokens.value_codes.page(index, weights.dtype)
        part = weights[..., start : start + codes.shape[1]]
        total = total + (part.flatten(1, 2) @ codes).unflatten(1, part.shape[1:3])
        start += codes.shape[1]
    return total
