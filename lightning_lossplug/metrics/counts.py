"""Counting zeros in weights, one by one and by groups."""

from __future__ import annotations

from torch import Tensor

from lightning_lossplug.errors import LossplugError


def zeros(weight: Tensor) -> int:
    """Returns how many entries are exactly zero."""
    return weight.numel() - int(weight.count_nonzero())


def compliant_groups(weight: Tensor, n: int, m: int, dim: int = -1) -> tuple[int, int]:
    """Counts the groups of ``m`` consecutive entries along ``dim`` with at most ``n`` nonzeros.

    Returns:
        Groups that comply, and groups.

    Raises:
        LossplugError: ``m`` doesn't divide the axis, or not ``1 <= n <= m``.
    """
    if not 1 <= n <= m:
        raise LossplugError(f"the pattern is {n}:{m}, allowed is 1 <= N <= M")
    if weight.shape[dim] % m:
        raise LossplugError(f"M = {m} does not divide the axis of {weight.shape[dim]}")
    groups = weight.movedim(dim, -1).reshape(-1, m)
    return int((groups.count_nonzero(dim=1) <= n).sum()), groups.shape[0]


def stored_bytes(weight: Tensor, m: int | None = None) -> int:
    """Returns the nominal size of a sparse weight: its nonzero values and where they are, or dense if that is less.

    Positions cost one bit per entry (a bitmap) or, for groups of ``m``, ``ceil(log2 m)`` bits per nonzero, whichever is
    less. A storage estimate: no kernel or file format is implied.
    """
    dense = weight.numel() * weight.element_size()
    kept = int(weight.count_nonzero())
    bits = weight.numel() if m is None else min(weight.numel(), kept * (m - 1).bit_length())
    return min(dense, kept * weight.element_size() + (bits + 7) // 8)
