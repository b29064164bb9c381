"""Codes in few bits: one float minimum and one scale per token and group of channels, packed into bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError

BITS = (16, 8, 4, 2)
GROUP = 64  # channels at most that share a range


def check_bits(where: str, bits: int) -> int:
    """Returns ``bits``, or raises unless it is 16 (the dtype of the keys), 8, 4 or 2.

    Raises:
        LossplugError: Another number.
    """
    if bits not in BITS:
        raise LossplugError(f"bits is {bits!r}, allowed are {', '.join(map(str, BITS))}", where=where)
    return bits


def groups_of(rank: int) -> tuple[int, int]:
    """Returns how many groups ``rank`` channels make, and how many channels each has (the last may be padded)."""
    groups = -(-rank // GROUP)
    return groups, -(-rank // groups)


def code_bytes(rank: int, bits: int, element_bytes: int) -> int:
    """Returns the bytes of one token's code: ``r`` elements, or packed bits and two float16 per group.

    Args:
        rank: Channels r.
        bits: 16 for elements of ``element_bytes``, else 8, 4 or 2.
        element_bytes: Bytes of an element of the model's keys.
    """
    if bits == 16:
        return rank * element_bytes
    groups, size = groups_of(rank)
    return -(-groups * size * bits // 8) + 4 * groups


def quantize_codes(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    r"""Rounds codes to b bits: :math:`q = \mathrm{round}((x - m)/s)`, :math:`s = (\max - \min)/(2^b - 1)`.

    The minimum m is a float, not a clamped integer zero point: a group that doesn't contain 0 loses nothing (the
    clamp is what made post-training quantisation fail in CSKV's code). Rounding error at most s/2.

    Args:
        codes: ``[..., r]``.
        bits: 8, 4 or 2.

    Returns:
        Packed uint8 ``[..., bytes]``, and float16 minimum and scale ``[..., groups, 2]``.
    """
    groups, size = groups_of(codes.shape[-1])
    x = codes.float()
    if (missing := groups * size - codes.shape[-1]) > 0:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)
    x = x.unflatten(-1, (groups, size))
    low, high = x.aminmax(dim=-1, keepdim=True)
    ranges = torch.cat([low, (high - low) / (2**bits - 1)], dim=-1).half()
    low, scale = ranges.float().split(1, dim=-1)
    q = ((x - low) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 2**bits - 1)
    return pack(q.flatten(-2).to(torch.uint8), bits), ranges


def dequantize_codes(packed: Tensor, ranges: Tensor, rank: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Returns the codes ``[..., r]`` of :func:`quantize_codes`: ``m + s q``."""
    groups, size = groups_of(rank)
    low, scale = ranges.to(dtype).split(1, dim=-1)
    q = unpack(packed, groups * size, bits).to(dtype).unflatten(-1, (groups, size))
    return torch.addcmul(low, q, scale).flatten(-2)[..., :rank]


def pack(values: Tensor, bits: int) -> Tensor:
    """Packs uint8 values below ``2^bits`` along the last axis, the first value in the lowest bits."""
    per_byte = 8 // bits
    values = F.pad(values, (0, -values.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = values[..., 0].clone()
    for i in range(1, per_byte):
        packed |= values[..., i] << (i * bits)
    return packed


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Undoes :func:`pack`; uint8 ``[..., count]``."""
    shifts = [(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(shifts, dim=-1).flatten(-2)[..., :count]
