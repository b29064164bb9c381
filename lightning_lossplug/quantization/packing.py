"""Packing integer codes of 1 to 8 bits into bytes, and getting them back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_bits

TRITS = 5  # ternary digits of one byte: 3^5 = 243


def bits_for(low: int, high: int) -> float:
    """Returns the bits that codes from ``low`` to ``high`` take: 1.6 (five per byte) for three levels."""
    levels = high - low + 1
    return 8 / TRITS if levels == 3 else max(1, math.ceil(math.log2(levels)))


def pack_codes(codes: Tensor, low: int, high: int) -> Tensor:
    """Packs codes from ``low`` to ``high`` without gaps, least significant bit first.

    Three levels are packed as five ternary digits per byte, others with ``ceil(log2(levels))`` bits each.

    Args:
        codes: Integers, any shape.
        low: Least code.
        high: Largest code.

    Returns:
        uint8, one axis.

    Raises:
        LossplugError: A code outside the range, or more than 256 levels.
    """
    bits = bits_for(low, high)
    if bits > 8:
        raise LossplugError(f"codes from {low} to {high} take more than 8 bits", where="pack_codes")
    flat = codes.flatten().to(torch.int64) - low
    if flat.numel() and not (int(flat.min()) >= 0 and int(flat.max()) <= high - low):
        raise LossplugError(
            f"codes reach from {int(flat.min()) + low} to {int(flat.max()) + low}, allowed is {low} to {high}",
            where="pack_codes",
        )
    if high - low == 2:
        digits = _padded(flat, TRITS).reshape(-1, TRITS)
        return (digits * 3 ** torch.arange(TRITS)).sum(1).to(torch.uint8)
    width = check_bits("pack_codes", bits, 1, 8)
    stream = ((flat[:, None] >> torch.arange(width)) & 1).flatten()
    return (_padded(stream, 8).reshape(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def unpack_codes(packed: Tensor, low: int, high: int, shape: Sequence[int]) -> Tensor:
    """Undoes :func:`pack_codes`.

    Args:
        packed: uint8.
        low: Least code.
        high: Largest code.
        shape: Shape of the codes.

    Returns:
        int32 codes.

    Raises:
        LossplugError: The bytes don't hold that many codes, or hold one out of range.
    """
    count = math.prod(shape)
    ternary = high - low == 2
    width = 0 if ternary else int(bits_for(low, high))
    need = -(-count // TRITS) if ternary else -(-count * width // 8)
    if packed.dtype != torch.uint8 or packed.numel() != need:
        raise LossplugError(
            f"{packed.numel()} bytes of {packed.dtype} for {count} codes, {need} of torch.uint8 are needed",
            where="unpack_codes",
            remedy="The file is corrupt or was written for another shape",
        )
    values = packed.flatten().to(torch.int64)
    if ternary:
        flat = (values[:, None] // 3 ** torch.arange(TRITS) % 3).flatten()[:count]
        if values.numel() and int(values.max()) >= 3**TRITS:
            flat = flat + 3  # no five digits make this byte
    else:
        stream = ((values[:, None] >> torch.arange(8)) & 1).flatten()[: count * width]
        flat = (stream.reshape(-1, width) << torch.arange(width)).sum(1)
    if flat.numel() and int(flat.max()) > high - low:
        raise LossplugError(
            f"a code of {int(flat.max()) + low} is above {high}", where="unpack_codes", remedy="The file is corrupt"
        )
    return (flat + low).reshape(tuple(shape)).to(torch.int32)


def _padded(flat: Tensor, multiple: int) -> Tensor:
    return torch.cat([flat, flat.new_zeros(-flat.numel() % multiple)])
