"""A layer of codes of which a decoding step reads a few tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.integrations.kv_cache.layer import ChannelShrunkLayer
from lightning_lossplug.kv_cache.labels import label_scores, round_labels, take_labels
from lightning_lossplug.kv_cache.latent import LatentTokens
from lightning_lossplug.kv_cache.sparse_codes import sparse_code_attention
from lightning_lossplug.kv_cache.store import nbytes


class SparseShrunkLayer(ChannelShrunkLayer):
    """Codes of old tokens, exact recent ones, and the label channels of all keys.

    Args:
        *args: Of :class:`ChannelShrunkLayer`.
        channels: Label channels, int64 ``[heads, r]``.
        count: Tokens that a query reads.
        bits: Of the labels.
    """

    def __init__(self, *args: Any, channels: Tensor, count: int, bits: int) -> None:
        super().__init__(*args)
        self.channels, self.count, self.label_bits = channels, count, bits
        self.labels: Tensor | None = None
        self.newest = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new tokens; a single one reads only the tokens that its labels choose."""
        states = super().update(key_states, value_states, *args, **kwargs)
        self.channels, self.newest = self.channels.to(key_states.device), key_states.shape[2]
        new = round_labels(take_labels(key_states, self.channels), self.label_bits)
        self.labels = new if self.labels is None else torch.cat([self.labels, new], dim=2)
        return states

    def _attend(self, tokens: LatentTokens, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        if self.newest > 1 or self.seen <= self.count or self.labels is None:
            return super()._attend(tokens, query, scale, mask)
        scores = label_scores(query, self.labels, self.channels, self.label_bits, mask)
        return sparse_code_attention(query, tokens, scores, self.count, scale, mask)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._apply(function)
        if self.labels is not None:
            self.labels = function(self.labels)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, as long as they are exact."""
        super().crop(tokens_to_remove)
        if self.labels is not None:
            self.labels = self.labels[:, :, : self.seen]

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        self.labels = None

    def nbytes(self) -> int:
        """Returns the bytes of the live tensors, labels among them."""
        return super().nbytes() + nbytes(self.labels)
