"""The rotary tables of all tokens of a cache, kept once for the layers that share them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lossplug.kv_cache.pages import Pages


class RotaryHistory:
    """Tables (cos, sin) as the model used them, token by token.

    They are kept rather than computed again because some models change their tables with the length of the text. Rows
    that are equal are kept as one. A table repeats every angle, by halves or one by one (``form`` says which), and is
    kept without the repetition.
    """

    def __init__(self) -> None:
        self.tables = Pages(2)  # [2, batch or 1, tokens, rotary / 2, or rotary if nothing repeats]
        self.form: str | None = None
        self.last: Tensor | None = None
        self.undone: tuple[tuple[int, int, bool], tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.tables)

    def same(self, cos: Tensor) -> bool:
        """Whether these are the tables that were added last."""
        return self.last is cos or (
            self.last is not None
            and self.last.shape == cos.shape
            and bool((self.last == cos.to(self.last.device)).all())
        )

    def append(self, cos: Tensor, sin: Tensor) -> None:
        """Adds the tables of new tokens, ``[batch or 1, tokens, rotary]``."""
        self.last, self.undone = cos, None
        new = torch.stack([cos, sin])
        if new.shape[1] > 1 and bool((new == new[:, :1]).all()):
            new = new[:, :1]
        if self.form is None:
            self.form = _form(new)
        if self.form == "halves":
            new = new.chunk(2, dim=-1)[0]
        elif self.form == "pairs":
            new = new[..., ::2]
        if len(self):
            old = self.tables.pages[0]
            new = new.to(old.device)
            if new.shape[1] > old.shape[1]:
                self.tables.apply(lambda t: t.expand(-1, new.shape[1], -1, -1).contiguous())
            elif new.shape[1] < old.shape[1]:
                new = new.expand(-1, old.shape[1], -1, -1)
        self.tables.append(new)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Returns (cos, sin) of the tokens ``start`` to ``stop``, ``[batch or 1, tokens, rotary]``."""
        part = self.tables.read(start, stop)
        if self.form == "halves":
            part = torch.cat([part, part], dim=-1)
        elif self.form == "pairs":
            part = part.repeat_interleave(2, dim=-1)
        cos, sin = part
        return cos, sin

    def page(self, index: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Returns the first ``tokens`` tables of a page without repetition, ``[batch or 1, tokens, 1, rotary / 2]``."""
        cos, sin = self.tables.pages[index][:, :, :tokens, None]
        return cos, sin

    def inverse(self, start: int, stop: int, *, compact: bool) -> tuple[Tensor, Tensor]:
        """Returns tables that undo the rotation of the tokens ``start`` to ``stop``, float32.

        The last answer is kept, since all layers of a cache ask for the same tokens.

        Args:
            start: First token.
            stop: The one after the last.
            compact: Without repetition of angles, ``[batch or 1, 1, tokens, rotary / 2]``; else as :meth:`read`.
        """
        key = (start, stop, compact)
        if self.undone is None or self.undone[0] != key:
            cos, sin = self.tables.read(start, stop)[:, :, None] if compact else self.read(start, stop)
            cos, sin = cos.float(), sin.float()
            size = cos.square() + sin.square()
            self.undone = key, (cos / size, -sin / size)
        return self.undone[1]

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Changes the batch, if rows are kept one by one."""
        self.last = self.undone = None
        if len(self) and self.tables.pages[0].shape[1] > 1:
            self.tables.apply(lambda page: torch.stack([function(table) for table in page]))

    def crop(self, length: int) -> None:
        """Keeps the tables of the first ``length`` tokens."""
        self.tables.crop(length)
        self.last = self.undone = None

    def token_bytes(self) -> int:
        """Returns what the tables of one token take."""
        if not len(self):
            return 0
        page = self.tables.pages[0]
        return page[:, :, 0].numel() * page.element_size()


def _form(tables: Tensor) -> str:
    if tables.shape[-1] % 2 == 0:
        first, second = tables.chunk(2, dim=-1)
        if torch.equal(first, second):
            return "halves"
        if torch.equal(tables[..., ::2], tables[..., 1::2]):
            return "pairs"
    return "whole"
