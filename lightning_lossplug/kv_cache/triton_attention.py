"""The attention over codes on GPUs: one kernel for the old tokens, and what puts the exact ones beside them."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache

import torch
from torch import Tensor

from lightning_lossplug.kv_cache.latent import LatentTokens, latent_attention

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels on CPUs, by its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_fits(tokens: LatentTokens) -> bool:
    """Whether the kernel can read what a layer holds."""
    from lightning_lossplug.kv_cache.kernels import WIDEST

    kept = (*tokens.key_codes.parts, *tokens.value_codes.parts, *tokens.tables.tables.pages)
    return (
        tokens.keys.dtype in _DTYPES
        and tokens.tables.tables.pages[0].dtype in _DTYPES
        and tokens.value_codes.rank <= WIDEST
        and all(part.is_contiguous() and part.device == tokens.keys.device for part in kept)
    )


def triton_attention(query: Tensor, tokens: LatentTokens, scale: float, mask: Tensor | None = None) -> Tensor:
    """Returns what :func:`lightning_lossplug.kv_cache.latent.latent_attention` returns, with softmax in float32.

    Args:
        query: Rotated queries, ``[batch, heads, rows, d]``.
        tokens: What they attend to, on a GPU, for which :func:`triton_fits` holds.
        scale: Of the scores.
        mask: Added to the scores, ``[batch or 1, heads or 1, rows or 1, T]``; None for none.
    """
    from lightning_lossplug.kv_cache.kernels import partial_attention

    decoders, old = tokens.decoders, len(tokens.key_codes)
    mask = None if mask is None else mask.float()
    ordered = query if decoders.pairing.in_halves else query[..., decoders.pairing.order]
    tops, masses, sums = partial_attention(ordered, tokens, scale, mask)
    score = (query @ tokens.keys.transpose(-1, -2)).float() * scale
    if mask is not None:
        score = score + mask[..., old:]
    values = tokens.values
    if tokens.sinks is not None:
        columns, sink_keys, sink_values = tokens.sinks
        first = (query @ sink_keys.transpose(-1, -2)).float() * scale
        if mask is not None:
            index = columns[:, None, None].expand(-1, *mask.shape[1:3], -1)
            first = first + mask.expand(len(columns), -1, -1, -1).gather(3, index)
        twice = columns >= old  # the recent tokens hold it, too
        twice[:, 1:] |= columns[:, 1:] == columns[:, :-1]
        score = torch.cat([first.masked_fill(twice[:, None, None], float("-inf")), score], dim=-1)
        values = torch.cat([sink_values, values], dim=-2)
    top = torch.maximum(tops.amax(2), score.amax(-1))
    share = (tops - top[:, :, None]).exp()
    coded, weights = (share * masses).sum(2), (score - top[..., None]).exp()
    out = (share[..., None] * sums).sum(2) @ decoders.values.float() + weights @ values.float()
    if decoders.value_mean is not None:
        out = out + coded[..., None] * decoders.value_mean.float()
    return (out / (coded + weights.sum(-1))[..., None]).to(query.dtype)


class CheckedTriton:
    """The kernel, compared with PyTorch at its first use for every kind of layer, and left where it doesn't hold.

    A GPU that can't compile it, or gets something else from it, costs one warning and never a wrong answer.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], bool] = {}

    def __call__(self, query: Tensor, tokens: LatentTokens, scale: float, mask: Tensor | None = None) -> Tensor:
        """Returns the attention, by the kernel if it is right here."""
        if not triton_fits(tokens):
            return latent_attention(query, tokens, scale, mask)
        codes = [(store.rank, store.bits) for store in (tokens.key_codes, tokens.value_codes)]
        kind = (query.device, query.dtype, query.shape, *codes, tokens.sinks is None, mask is None)
        if kind not in self.known:
            self.known[kind] = self._holds(query, tokens, scale, mask)
        way = triton_attention if self.known[kind] else latent_attention
        return way(query, tokens, scale, mask)

    def _holds(self, query: Tensor, tokens: LatentTokens, scale: float, mask: Tensor | None) -> bool:
        expected = latent_attention(query, tokens, scale, mask).float()
        try:
            found = triton_attention(query, tokens, scale, mask).float()
        except Exception as error:  # whatever compilers and drivers raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        else:
            # codes of few bits are unpacked in float32 here, and in the dtype of the model there
            tolerance = 1e-3 if query.dtype is torch.float32 else 5e-2
            gap = float((found - expected).abs().amax())
            if gap <= tolerance * max(float(expected.abs().amax()), 1e-6):
                return True
            reason = f"it is off by {gap:.2g}"
        warnings.warn(f"attention over codes runs in PyTorch, since its Triton kernel can't be used: {reason}")
        return False


attend = CheckedTriton()
