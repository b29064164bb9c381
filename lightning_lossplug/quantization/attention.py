"""Attention with quantised operands: queries, keys, values and the probabilities of the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.bivit import bivit_attention
from lightning_lossplug.quantization.grid import upcast
from lightning_lossplug.quantization.lsq import LSQ
from lightning_lossplug.surgery.plug import WeightTransform

ROWS = 4096  # rows of probabilities that set their step
OPERANDS = ("query", "key", "value", "probabilities")


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    weights: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Returns :math:`f(q k^T\,scale + mask)\,v`: ``F.scaled_dot_product_attention`` with its weights in the open.

    Computed in float32 (float64 stays). Rows whose keys are all masked are zero, as torch has them.

    Args:
        query: [..., heads, L, E].
        key: [..., heads, S, E].
        value: [..., heads, S, Ev].
        attn_mask: Broadcasts to [..., L, S]: True where a key is seen, or numbers added to the scores.
        dropout_p: Share of the weights dropped, whatever the mode of the module.
        is_causal: A query sees the keys up to its own position.
        scale: Factor of the scores; None is :math:`1/\sqrt E`.
        enable_gqa: Keys and values have fewer heads, which consecutive heads of the queries share.
        weights: f, from scores to the weights of the values over the last axis; None is the softmax.
    """
    device = query.device.type
    mixed = torch.is_autocast_enabled(device) and query.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if mixed else query.dtype
    with torch.autocast(device, enabled=False):
        q, k, v = upcast(query), upcast(key), upcast(value)
        if enable_gqa:
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
            v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        blocked = None
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
            blocked = (scores == -torch.inf).all(-1, keepdim=True)
            scores = scores.masked_fill(blocked, 0.0)  # their softmax would be NaN, and so would its gradient
        p = scores.softmax(-1) if weights is None else weights(scores)
        if blocked is not None:
            p = p.masked_fill(blocked, 0.0)
        if dropout_p:
            p = F.dropout(p, dropout_p)
        return (p @ v).to(dtype)


def binary_weights(scores: Tensor, attn_ratio: float = 0.25) -> Tensor:
    """Returns BiViT's binary attention times the mean probability of what a row keeps: one number per row.

    The weights of a row are 0 or that mean, so the product is one of bits; without it the output would grow with the
    number of tokens. The gradient is that of :func:`bivit_attention` and of the mean.

    Args:
        scores: Attention scores, masks included.
        attn_ratio: Share of the row's largest probability above which an entry is kept.

    Source: He et al., BiViT, arXiv 2211.07091, which scales the output; that it is by this mean is our choice.
    """
    kept = bivit_attention(scores, attn_ratio)
    bits = kept.detach()
    return kept * ((scores.softmax(-1) * bits).sum(-1, keepdim=True) / bits.sum(-1, keepdim=True))


class Probabilities(LSQ):
    """LSQ of probabilities: codes from 0, and a first step of least squared error, so at most that of [0, 1].

    Args:
        bits: 2 to 8.
        init_batches: Training batches that set the step.
    """

    def __init__(self, bits: int = 8, init_batches: int = 1) -> None:
        super().__init__(bits, signed=False, init="mse", role="activation", init_batches=init_batches)

    def set_scales(self, x: Tensor) -> None:
        """From some rows of every head: the search reads them 80 times."""
        rows = x.reshape(-1, x.shape[-1])
        every = max(1, len(rows) // ROWS)
        while every > 1 and math.gcd(every, x.shape[-2]) > 1:
            every += 1  # a stride that shares a factor with the queries of a head would skip some of them in all heads
        super().set_scales(rows[::every])


class AttentionQuant(WeightTransform):
    """Computes the attention of a module with quantised operands; see :func:`explicit_attention`.

    Quantised are queries, keys and values as they enter the products (after rotary embeddings and norms), and the
    probabilities, before dropout. Until the first training batch has set their steps they pass as they are.

    Args:
        query: Quantiser of the queries.
        key: Of the keys.
        value: Of the values.
        probabilities: Of the probabilities; None makes them binary, as :func:`binary_weights` does.
    """

    stage: ClassVar[str] = "quantization"

    def __init__(self, query: Quantizer, key: Quantizer, value: Quantizer, probabilities: Quantizer | None) -> None:
        super().__init__()
        self.query, self.key, self.value, self.probabilities = query, key, value, probabilities

    def quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        """Yields ``(operand, quantiser)``."""
        for name in OPERANDS:
            if (quantizer := getattr(self, name)) is not None:
                yield name, quantizer

    def weights(self, scores: Tensor) -> Tensor:
        """Returns the quantised probabilities of scores."""
        return binary_weights(scores) if self.probabilities is None else self.probabilities(scores.softmax(-1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes the arguments of ``F.scaled_dot_product_attention``."""
        q, k, v = self.query(query), self.key(key), self.value(value)
        return explicit_attention(q, k, v, *args, weights=self.weights, **kwargs)  # type: ignore[misc]

    def check_fold(self) -> str | None:
        """Refuses steps that were never set or have left the positive numbers."""
        for _, quantizer in self.quantizers():
            try:
                quantizer.check_ready()
            except LossplugError as error:
                return f"{error.what}. {error.remedy}"
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Nothing of its own to load; the quantisers do."""
