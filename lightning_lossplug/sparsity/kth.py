"""Exact order statistics of streams too long to hold."""

from __future__ import annotations

import torch
from torch import Tensor


class KthSmallest:
    """The exact k-th smallest of a stream of non-negative numbers that is seen twice, in 0.5 MB.

    The bit patterns of non-negative float32 numbers are ordered like the numbers, so the first pass counts their upper
    16 bits, and the second the lower 16 bits of those in the bin where the k-th is.
    """

    def __init__(self) -> None:
        self.upper = torch.zeros(1 << 15, dtype=torch.long)
        self.lower = torch.zeros(1 << 16, dtype=torch.long)
        self.bin: int | None = None
        self.rank = 0

    def first(self, values: Tensor) -> None:
        """Counts a part of the stream, in the first pass."""
        self.upper += torch.bincount(_bits(values) >> 16, minlength=len(self.upper)).cpu()

    def choose(self, fraction: float) -> None:
        """Ends the first pass: the ``floor(fraction * N)``-th smallest is wanted (0: a threshold of 0)."""
        rank = int(fraction * int(self.upper.sum()) + 1e-9)
        if rank:
            below = self.upper.cumsum(0)
            self.bin = int((below >= rank).nonzero()[0])
            self.rank = rank - int(below[self.bin] - self.upper[self.bin])

    def second(self, values: Tensor) -> None:
        """Counts a part of the same stream, in the second pass."""
        if self.bin is not None:
            bits = _bits(values)
            self.lower += torch.bincount(bits[bits >> 16 == self.bin] & 0xFFFF, minlength=len(self.lower)).cpu()

    def value(self) -> float:
        """Returns the number."""
        if self.bin is None:
            return 0.0
        low = int((self.lower.cumsum(0) >= self.rank).nonzero()[0])
        return float(torch.tensor(self.bin << 16 | low, dtype=torch.int32).view(torch.float32))


def _bits(values: Tensor) -> Tensor:
    return values.detach().float().abs().flatten().view(torch.int32)
