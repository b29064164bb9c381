"""A tensor that grows along one axis, kept in pages so that a new token copies the last page only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 1024  # tokens


class Pages:
    """Tensors of ``PAGE`` tokens each, the last one of what is left: no byte more than the tokens take.

    Args:
        axis: Where the tokens are.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.pages: list[Tensor] = []
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def append(self, new: Tensor) -> None:
        """Adds tokens at the end."""
        count = new.shape[self.axis]
        room = -self.length % PAGE
        self.length += count
        if room:
            first = new if count <= room else new.narrow(self.axis, 0, room)
            self.pages[-1] = torch.cat([self.pages[-1], first], dim=self.axis)
            new = new.narrow(self.axis, 0, 0) if count <= room else new.narrow(self.axis, room, count - room)
        if new.shape[self.axis]:
            # a view would keep the memory of whatever it was cut from
            self.pages += [part.clone(memory_format=torch.contiguous_format) for part in new.split(PAGE, self.axis)]

    def read(self, start: int, stop: int) -> Tensor:
        """Returns the tokens ``start`` to ``stop``."""
        first, last = start // PAGE, max(stop - 1, start) // PAGE
        if first == last:
            return self.pages[first].narrow(self.axis, start - first * PAGE, stop - start)
        parts = list(self.pages[first : last + 1])
        parts[-1] = parts[-1].narrow(self.axis, 0, stop - last * PAGE)
        parts[0] = parts[0].narrow(self.axis, start - first * PAGE, parts[0].shape[self.axis] - (start - first * PAGE))
        return torch.cat(parts, dim=self.axis)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every page, for a change of batch or device."""
        self.pages = [function(page) for page in self.pages]

    def crop(self, length: int) -> None:
        """Keeps the first ``length`` tokens."""
        count = -(-length // PAGE)
        self.pages = self.pages[:count]
        if length % PAGE:
            self.pages[-1] = self.pages[-1].narrow(self.axis, 0, length % PAGE).clone()
        self.length = length

    def clear(self) -> None:
        """Forgets all tokens."""
        self.pages, self.length = [], 0
