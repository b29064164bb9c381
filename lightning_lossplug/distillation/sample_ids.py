"""Which sample a row of a batch is: by what it holds, or by an id that the data set gives."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError

_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "x")
_CHUNK = 1 << 14  # small enough for the processor's cache


class Identified(NamedTuple):
    """A batch with the ids of its samples; distillation callbacks take the ids off before the module sees the batch.

    Args:
        sample: The batch as the module expects it.
        sample_id: int64 [N].
    """

    sample: Any
    sample_id: Tensor


def content_ids(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns a 64-bit hash [N] (int64) of every sample of a batch [N, ...], on the batch's device.

    The same sample has the same id in every batch, epoch and process. Two multilinear hashes of 32 bits each over the
    words of a sample: for a million different samples the chance that any two share an id is below 1 in 10^7. Masked
    entries don't count, so that token sequences padded on the right keep their id at any padding.

    Args:
        x: Inputs of any dtype, in the precision that the network gets.
        mask: Entries that count [N, L], for integer inputs [N, L].
    """
    if x.is_floating_point():
        words = x.detach().reshape(len(x), -1).contiguous()
        words = words.view(torch.int16 if words.element_size() == 2 else torch.int32)
    else:
        words = x.detach().reshape(len(x), -1).to(torch.int64) + 1  # padding is 0, and token 0 is not
        if mask is not None:
            words = words * mask.reshape(words.shape).to(words)
    first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    second = torch.zeros_like(first)
    for start in range(0, words.shape[1], _CHUNK):
        part = words[:, start : start + _CHUNK].to(torch.int64)
        a, b = _coefficients(start // _CHUNK, x.device)
        first += (part * a[: part.shape[1]]).sum(dim=1)
        second += (part * b[: part.shape[1]]).sum(dim=1)
    # the upper halves of the sums (which wrap around) are the hashes
    return (first & ~0xFFFFFFFF) | ((second >> 32) & 0xFFFFFFFF)


@functools.lru_cache(maxsize=256)
def _coefficients(chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0x5EED + chunk)
    low, high = -(1 << 63), (1 << 63) - 1
    a, b = (torch.randint(low, high, (_CHUNK,), generator=generator) for _ in range(2))
    return a.to(device), b.to(device)


def main_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Returns the input of a call that tells samples apart, and the mask of tokens.

    It is the first tensor among the arguments, else ``input_ids``, ``pixel_values``, ``inputs_embeds``,
    ``input_values`` or ``x``, else the first tensor among the keywords; the mask is ``attention_mask``.

    Raises:
        LossplugError: There is no tensor.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    tensors += [kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)]
    tensors += [value for value in kwargs.values() if isinstance(value, Tensor)]
    if not tensors:
        raise LossplugError("the network was called without a tensor", where="sample ids")
    x, mask = tensors[0], kwargs.get("attention_mask")
    tokens = x.ndim == 2 and not x.is_floating_point()
    return x, mask if tokens and isinstance(mask, Tensor) and mask.shape == x.shape else None
