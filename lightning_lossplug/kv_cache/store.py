"""A growing sequence of codes in any number of bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lossplug.kv_cache.codes import dequantize_codes, quantize_codes


class CodeStore:
    """Codes of the old tokens of one projection, ``[batch, tokens, r]``, in the form they are kept in.

    Args:
        rank: Channels r of a code.
        bits: 16 keeps them as they come; 8, 4 or 2 packs them (:func:`quantize_codes`).
    """

    def __init__(self, rank: int, bits: int) -> None:
        self.rank, self.bits = rank, bits
        self.parts: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.parts[0].shape[1] if self.parts else 0

    def append(self, codes: Tensor) -> None:
        """Adds codes ``[batch, tokens, r]`` at the end."""
        new = (codes,) if self.bits == 16 else quantize_codes(codes, self.bits)
        pairs = zip(self.parts, new, strict=True)
        self.parts = tuple(torch.cat(pair, dim=1) for pair in pairs) if self.parts else new

    def read(self, dtype: torch.dtype) -> Tensor:
        """Returns all codes, ``[batch, tokens, r]``."""
        if self.bits == 16:
            return self.parts[0]
        packed, ranges = self.parts
        return dequantize_codes(packed, ranges, self.rank, self.bits, dtype)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor, for a change of batch or device."""
        self.parts = tuple(function(part) for part in self.parts)

    def clear(self) -> None:
        """Forgets all codes."""
        self.parts = ()


def nbytes(*tensors: Tensor | None) -> int:
    """Returns the bytes of the memory behind tensors, counted once where they share it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())
