"""Attention over the codes of a few tokens: Double Sparsity on a shrunk cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.kv_cache.latent import LatentTokens


def sparse_code_attention(
    query: Tensor, tokens: LatentTokens, scores: Tensor, count: int, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of every row over the ``count`` tokens of its largest approximate scores.

    Of the chosen tokens the old ones are read from their codes: their keys are rebuilt and rotated, their values are
    weighted as codes and decoded once. The same as rebuilding everything first, up to rounding.

    Args:
        query: Rotated queries, ``[batch, heads, rows, d]``.
        tokens: What they attend to, T tokens, some of them coded.
        scores: ``[batch, heads, rows, T]`` (:func:`label_scores`).
        count: Tokens, below T.
        scale: Of the exact scores.
        mask: Added to the exact scores, ``[batch or 1, heads or 1, rows or 1, T]``; None for none.

    Returns:
        ``[batch, heads, rows, d_V]``.
    """
    batch, heads, rows, total = scores.shape
    decoders, old = tokens.decoders, len(tokens.key_codes)
    order, dtype = decoders.pairing.order, query.dtype
    index = scores.topk(count, dim=-1).indices
    flat = index.flatten(2)
    coded, place = flat < old, flat.clamp_max(old - 1)

    def pick(states: Tensor, where: Tensor) -> Tensor:
        """``[batch or 1, heads or 1, n, x]`` -> ``[batch, heads, chosen, x]``."""
        states = states.expand(batch, heads, -1, -1)
        return states.gather(2, where[..., None].expand(-1, -1, -1, states.shape[-1]))

    decode = decoders.keys.unflatten(1, (heads, -1)).transpose(0, 1)
    keys = pick(tokens.key_codes.read(dtype)[:, None], place) @ decode
    if decoders.key_mean is not None:
        keys = keys + decoders.key_mean.view(heads, 1, -1)
    cos, sin = (pick(table[:, None], place) for table in tokens.tables.tables.read(0, old))
    keys = decoders.pairing.turn(keys, cos, sin).to(dtype)
    recent = (flat - old).clamp_min(0)
    keys = torch.where(coded[..., None], keys, pick(tokens.keys, recent)[..., order])
    exact = pick(tokens.values, recent)
    if tokens.sinks is not None:
        columns, sink_keys, sink_values = tokens.sinks
        for i in range(columns.shape[1]):
            hit = flat == columns[:, i, None, None]
            keys = torch.where(hit[..., None], sink_keys[:, :, i : i + 1, order], keys)
            exact = torch.where(hit[..., None], sink_values[:, :, i : i + 1], exact)
            coded = coded & ~hit
    keys = keys.unflatten(2, (rows, count))
    score = (keys @ (query[..., order] * scale)[..., None])[..., 0].float()
    if mask is not None:
        score = score + mask.expand(batch, heads, rows, total).gather(-1, index)
    weights = score.softmax(-1).to(dtype)
    through = weights * coded.unflatten(2, (rows, count))
    codes = pick(tokens.value_codes.read(dtype)[:, None], place).unflatten(2, (rows, count))
    rebuilt = (through[..., None, :] @ codes)[..., 0, :] @ decoders.values
    if decoders.value_mean is not None:
        rebuilt = rebuilt + through.sum(-1, keepdim=True) * decoders.value_mean
    return rebuilt + ((weights - through)[..., None, :] @ exact.unflatten(2, (rows, count)))[..., 0, :]
