"""Masks as bits: one per weight, in rows of whole bytes along the weight's first axis.

A weight of shape ``[R, ...]`` with K entries per index of the first axis has bits ``[R, ceil(K / 8)]``, uint8: entry
``i`` of a row, in row-major order, is bit ``i % 8`` (the lowest is 0) of byte ``i // 8``; spare bits are 0. A shard of
the weight's rows, as FSDP2 and column-parallel layers make it, therefore has the same rows of the bits.

On a CPU nothing is unpacked to use a mask: a byte is looked up in a table of 256 rows with what becomes of eight
weights, in C++ (:mod:`~lightning_lossplug.sparsity.native`) or, without a compiler, by torch. Either is also faster
than ``torch.where``, whose branches a mask makes unpredictable (``tests/benchmarks/bench_mask_bits.py``). Elsewhere,
and under ``torch.compile``, bits are shifts and comparisons that fuse with what uses them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.sparsity._select import INTEGER_OF_SIZE
from lightning_lossplug.sparsity.native import changed as changed_bits
from lightning_lossplug.sparsity.native import keep, native, room_for, scale
from lightning_lossplug.surgery.shards import is_sharded, shard_like

_WORDS = sys.byteorder == "little"
# A product with this moves the lowest bit of byte k of a word to bit 56 + k; no two terms meet.
_GATHER = sum(1 << (56 - 7 * k) for k in range(8))
# What the bits of a byte say, ``[256, 8]``; as words of eight bytes; and with all bits set where an entry is kept.
_KEPT = torch.tensor([[byte >> place & 1 for place in range(8)] for byte in range(256)], device="cpu").bool()
_KEPT_WORDS = _KEPT.view(torch.int64).view(-1)
_ALL_BITS = {dtype: _KEPT.to(dtype).neg() for dtype in INTEGER_OF_SIZE.values()}


def row_length(shape: Sequence[int]) -> int:
    """Returns the entries per index of the first axis."""
    return math.prod(shape[1:])


def pack_rows(mask: Tensor) -> Tensor:
    """Returns a bool mask of at least one axis as bits ``[R, ceil(K / 8)]``."""
    rows, length = mask.shape[0], row_length(mask.shape)
    flat = mask.detach().reshape(rows, length)
    if length % 8:
        flat = torch.nn.functional.pad(flat, (0, -length % 8))
    if not _WORDS or torch.compiler.is_compiling():
        places = torch.arange(8, dtype=torch.uint8, device=mask.device)
        return (flat.view(rows, -1, 8).to(torch.uint8) << places).sum(2, dtype=torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    return (flat.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_rows(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the bool mask of a shape from its bits."""
    if _looked_up(bits):
        words = _KEPT_WORDS.index_select(0, bits.reshape(-1).int())
        return _cut(words.view(torch.bool), bits, shape)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return _cut((bits.unsqueeze(2) >> places).bitwise_and(1).bool(), bits, shape)


def masked(values: Tensor, bits: Tensor) -> Tensor:
    """Returns ``values`` where a mask is set and ``+0.0``, whatever they hold, elsewhere."""
    if (library := native(values, bits)) is not None:
        return keep(library, values.detach(), bits, room_for(values))
    if not (_looked_up(bits) and values.is_contiguous()):
        return torch.where(unpack_rows(bits, values.shape), values, 0.0)
    integer = INTEGER_OF_SIZE[values.element_size()]
    found = _cut(_ALL_BITS[integer].index_select(0, bits.reshape(-1).int()), bits, values.shape)
    return found.bitwise_and_(values.view(integer)).view(values.dtype)


def mask_(values: Tensor, bits: Tensor) -> Tensor:
    """Sets ``values`` to 0 where a mask isn't set, in place."""
    if (library := native(values, bits)) is not None:
        return keep(library, values, bits, values)
    if not (_looked_up(bits) and values.is_contiguous()):
        return values.mul_(unpack_rows(bits, values.shape))
    integer = INTEGER_OF_SIZE[values.element_size()]
    found = _cut(_ALL_BITS[integer].index_select(0, bits.reshape(-1).int()), bits, values.shape)
    values.detach().view(integer).bitwise_and_(found)
    return values


def attenuated(values: Tensor, bits: Tensor, decay: float) -> Tensor:
    """Returns float32 or float64 ``values`` where a mask is set and ``decay`` times them elsewhere."""
    if (library := native(values, bits)) is not None:
        return scale(library, values, bits, room_for(values), 1.0, decay)
    return factors(bits, values, 1.0, decay).mul_(values)


def factors(bits: Tensor, like: Tensor, kept: float, pruned: float | Tensor) -> Tensor:
    """Returns ``kept`` where a mask is set and ``pruned`` elsewhere, in shape and dtype of ``like``."""
    high = torch.as_tensor(kept, dtype=like.dtype, device=bits.device)
    low = torch.as_tensor(pruned, dtype=like.dtype, device=bits.device)
    if not _looked_up(bits):
        return torch.where(unpack_rows(bits, like.shape), high, low)
    table = torch.where(_KEPT, high, low)
    return _cut(table.index_select(0, bits.reshape(-1).int()), bits, like.shape)


def changed(before: Tensor, after: Tensor) -> int:
    """Returns how many entries two masks of one shape disagree on, from their bits (waits for the device)."""
    if (library := native(before, after)) is not None:
        return changed_bits(library, before, after)
    x = before ^ after
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return int(((x + (x >> 4)) & 0x0F).sum())


def flat_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the bits of a mask as one row, ``[1, ceil(numel / 8)]``."""
    if row_length(shape) % 8 == 0:
        return bits.reshape(1, -1)
    return pack_rows(unpack_rows(bits, shape).reshape(1, -1))


def shard_bits(bits: Tensor, weight: Tensor) -> Tensor:
    """Returns the bits of this rank's part of a weight from those of the whole one."""
    if not is_sharded(weight):
        return bits
    if all(place.is_replicate() or place.is_shard(0) for place in weight.placements):  # type: ignore[attr-defined]
        return shard_like(bits, weight)
    return pack_rows(shard_like(unpack_rows(bits, weight.shape), weight))


def _looked_up(bits: Tensor) -> bool:
    return _WORDS and bits.device.type == "cpu" and not torch.compiler.is_compiling()


def _cut(entries: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Takes the spare entries off the rows."""
    rows, length = bits.shape[0], math.prod(shape) // max(bits.shape[0], 1)
    entries = entries.view(rows, bits.shape[1] * 8)
    return entries[:, :length].reshape(shape)
