"""The rotary tables of all tokens of a cache, kept once for the layers that share them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RotaryHistory:
    """Tables (cos, sin) as the model used them, token by token.

    They are kept rather than computed again because some models change their tables with the length of the text. Rows
    that are equal are kept as one, and so are the two halves of a table, which rotary embeddings repeat.
    """

    def __init__(self) -> None:
        self.tables: Tensor | None = None  # [2, batch or 1, tokens, rotary or rotary / 2]
        self.halved = False
        self.last: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.tables is None else self.tables.shape[2]

    def same(self, cos: Tensor) -> bool:
        """Whether these are the tables that were added last."""
        return self.last is cos or (
            self.last is not None
            and self.last.shape == cos.shape
            and bool((self.last == cos.to(self.last.device)).all())
        )

    def append(self, cos: Tensor, sin: Tensor) -> None:
        """Adds the tables of new tokens, ``[batch or 1, tokens, rotary]``."""
        self.last = cos
        new = torch.stack([cos, sin])
        if new.shape[1] > 1 and bool((new == new[:, :1]).all()):
            new = new[:, :1]
        if self.tables is None:
            first, second = new.chunk(2, dim=-1)
            self.halved = first.shape == second.shape and torch.equal(first, second)
            self.tables = first.clone() if self.halved else new
            return
        if self.halved:
            new = new.chunk(2, dim=-1)[0]
        new = new.to(self.tables.device)
        batch = max(self.tables.shape[1], new.shape[1])
        self.tables = torch.cat([part.expand(-1, batch, -1, -1) for part in (self.tables, new)], dim=2)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Returns (cos, sin) of the tokens ``start`` to ``stop``, ``[batch or 1, tokens, rotary]``."""
        assert self.tables is not None
        part = self.tables[:, :, start:stop]
        cos, sin = torch.cat([part, part], dim=-1) if self.halved else part
        return cos, sin

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Changes the batch, if rows are kept one by one."""
        self.last = None
        if self.tables is not None and self.tables.shape[1] > 1:
            self.tables = torch.stack([function(table) for table in self.tables])
