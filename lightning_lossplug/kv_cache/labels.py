"""Double Sparsity: the few channels that tell which tokens a query will attend to, and attention over those tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError

STATISTICS = ("q", "k", "qk")


def label_channels(statistic: Tensor, count: int) -> Tensor:
    """Returns the ``count`` channels of the largest statistic, int64 ``[heads, count]``, in falling order.

    Args:
        statistic: One value per key-value head and channel, ``[heads, d]``.
        count: Channels r, 1 to d.

    Raises:
        LossplugError: Another count.
    """
    width = statistic.shape[-1]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= width:
        raise LossplugError(f"channels is {count!r}, allowed are whole numbers from 1 to {width}", where="labels")
    return statistic.argsort(dim=-1, descending=True, stable=True)[..., :count]


def take_labels(states: Tensor, channels: Tensor) -> Tensor:
    """Returns the label channels ``[batch, heads, n, r]`` of queries or keys ``[batch, heads, n, d]``."""
    return states.gather(-1, channels[None, :, None].expand(*states.shape[:1], -1, states.shape[2], -1))


def round_labels(labels: Tensor, bits: int) -> Tensor:
    """Rounds labels to ``2^bits`` levels between the least and the largest of every token and head; 16 leaves them."""
    if bits == 16:
        return labels
    low, high = labels.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.round((labels - low) / scale) * scale + low


def label_scores(query: Tensor, labels: Tensor, channels: Tensor, bits: int, mask: Tensor | None = None) -> Tensor:
    r"""Returns approximate scores :math:`q_C k_C^\top / \sqrt r` plus the mask, ``[batch, heads, rows, T]``.

    Args:
        query: Rotated queries, ``[batch, heads, rows, d]``.
        labels: Of the keys, ``[batch, heads, T, r]``.
        channels: ``[heads, r]``.
        bits: Of the labels.
        mask: Added to the scores; None for none.
    """
    own = round_labels(take_labels(query, channels), bits)
    scores = own @ labels.transpose(-1, -2) / labels.shape[-1] ** 0.5
    return scores if mask is None else scores + mask


def sparse_attention(
    query: Tensor, keys: Tensor, values: Tensor, scores: Tensor, count: int, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of every row over the ``count`` tokens of its largest approximate scores, exactly.

    Args:
        query: ``[batch, heads, rows, d]``.
        keys: ``[batch, heads, T, d]``.
        values: The same.
        scores: ``[batch, heads, rows, T]`` (:func:`label_scores`).
        count: Tokens; T or more is dense attention.
        scale: Of the exact scores.
        mask: Added to the exact scores, ``[batch or 1, heads or 1, rows or 1, T]``; None for none.

    Returns:
        ``[batch, heads, rows, d]``.
    """
    batch, heads, rows, tokens = scores.shape
    if count >= tokens:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=_like(mask, query), scale=scale)
    index = scores.topk(count, dim=-1).indices
    flat = index.flatten(2)[..., None]
    near, far = (t.gather(2, flat.expand(-1, -1, -1, t.shape[-1])) for t in (keys, values))
    near, far = near.unflatten(2, (rows, count)), far.unflatten(2, (rows, count))
    score = (near @ query[..., None] * scale)[..., 0].float()
    if mask is not None:
        score = score + mask.expand(batch, heads, rows, tokens).gather(-1, index)
    return (score.softmax(-1).to(query.dtype)[..., None, :] @ far)[..., 0, :]


def chosen(scores: Tensor, count: int) -> Tensor:
    """Returns which tokens are among the ``count`` largest scores of a row, bool like ``scores``."""
    if count >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, dim=-1).indices, True)


def _like(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(query.dtype)
