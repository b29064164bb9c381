"""Which of the last tokens a shrunk cache still holds exactly."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

RESIDUALS = ("sliding", "block", "block_lagged")
Count = TypeVar("Count", int, Tensor)


def exact_tokens(tokens: Count, window: int, residual: str = "sliding") -> Count:
    """Returns how many of the last tokens the newest one sees exactly, itself among them, if there are as many.

    ``sliding``: always w. ``block``: those since the last multiple of w, 1 to w; the token that completes a block still
    sees it exactly. ``block_lagged``: a block of w is coded once 2 w tokens are exact, so w to 2 w - 1.

    Args:
        tokens: Tokens up to the newest, itself among them; a number or int64 of any shape.
        window: The window w.
        residual: ``sliding``, ``block`` or ``block_lagged``.
    """
    if residual == "block":
        return (tokens - 1) % window + 1
    if residual == "block_lagged":
        return tokens % window + window
    return tokens * 0 + window
