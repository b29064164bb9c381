"""A cache layer whose rows and place change all at once, whatever it holds beside keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class MovableLayer(DynamicLayer):
    """Row operations and moves of transformers' cache layers, by one function over the tensors held.

    A subclass that holds more than keys and values extends :meth:`_apply`.
    """

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        self._apply(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._apply(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self._apply(lambda t: t[indices])

    def offload(self) -> None:
        """Moves everything to the CPU."""
        self._apply(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves everything back."""
        self._apply(lambda t: t.to(self.device, non_blocking=True))
