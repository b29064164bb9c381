"""Bytes of a KV cache, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_lossplug.kv_cache.codes import code_bytes


@dataclass(frozen=True)
class BranchSize:
    """What decides how much one projection of one layer keeps.

    Args:
        width: Channels of all heads, c.
        rank: Channels of a code, r.
        bits: Bits of a code's channel; 16 for elements of the model's dtype.
    """

    width: int
    rank: int
    bits: int = 16


def dense_token_bytes(branches: list[BranchSize], element_bytes: int) -> int:
    """Returns what one old token costs uncoded: the sum of the widths times the bytes of an element."""
    return sum(branch.width for branch in branches) * element_bytes


def shrunk_token_bytes(branches: list[BranchSize], element_bytes: int) -> int:
    """Returns what one old token costs coded, ranges of few-bit codes included."""
    return sum(code_bytes(branch.rank, branch.bits, element_bytes) for branch in branches)


def cache_bytes(
    branches: list[BranchSize],
    tokens: int,
    window: int,
    element_bytes: int,
    *,
    batch: int = 1,
    rotary: int = 0,
    sinks: int = 0,
) -> int:
    """Returns the bytes of a shrunk cache: codes of old tokens, exact recent ones, rotary tables.

    Args:
        branches: Keys and values of every shrunk layer.
        tokens: Tokens T seen.
        window: Last tokens kept exactly (:func:`exact_tokens`).
        element_bytes: Bytes of an element of the model's keys.
        batch: Rows.
        rotary: Bytes per token of the tables that un-rotated keys are rotated with; kept once for all layers.
        sinks: First tokens of every row kept exactly beside their codes, and their places, once, as int64.
    """
    old = max(tokens - window, 0)
    exact = (tokens - old) * dense_token_bytes(branches, element_bytes)
    first = sinks * (dense_token_bytes(branches, element_bytes) + 8)
    return batch * (old * shrunk_token_bytes(branches, element_bytes) + exact + first) + tokens * rotary
