"""A growing sequence of codes in any number of bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lossplug.kv_cache.codes import dequantize_codes, quantize_codes
from lightning_lossplug.kv_cache.pages import Pages


class CodeStore:
    """Codes of the old tokens of one projection, ``[batch, tokens, r]``, in the form they are kept in.

    Args:
        rank: Channels r of a code.
        bits: 16 keeps them as they come; 8, 4 or 2 packs them (:func:`quantize_codes`).
    """

    def __init__(self, rank: int, bits: int) -> None:
        self.rank, self.bits = rank, bits
        self.forms = (Pages(1),) if bits == 16 else (Pages(1), Pages(1))  # codes; or packed codes and their ranges

    def __len__(self) -> int:
        return len(self.forms[0])

    @property
    def pages(self) -> int:
        """Pages that the codes are kept in."""
        return len(self.forms[0].pages)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors that are kept."""
        return tuple(page for form in self.forms for page in form.pages)

    def append(self, codes: Tensor) -> None:
        """Adds codes ``[batch, tokens, r]`` at the end."""
        new = (codes,) if self.bits == 16 else quantize_codes(codes, self.bits)
        for form, part in zip(self.forms, new, strict=True):
            form.append(part)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Returns all codes, ``[batch, tokens, r]``."""
        pages = [self.page(index, dtype) for index in range(self.pages)]
        return pages[0] if len(pages) == 1 else torch.cat(pages, dim=1)

    def page(self, index: int, dtype: torch.dtype) -> Tensor:
        """Returns the codes of one page, ``[batch, tokens of the page, r]``."""
        if self.bits == 16:
            return self.forms[0].pages[index]
        packed, ranges = (form.pages[index] for form in self.forms)
        return dequantize_codes(packed, ranges, self.rank, self.bits, dtype)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor, for a change of batch or device."""
        for form in self.forms:
            form.apply(function)

    def clear(self) -> None:
        """Forgets all codes."""
        for form in self.forms:
            form.clear()


def nbytes(*tensors: Tensor | None) -> int:
    """Returns the bytes of the memory behind tensors, counted once where they share it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())
