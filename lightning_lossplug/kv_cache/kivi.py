"""Rounding of keys by channel and of values by token, as KIVI does it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.codes import check_bits, pack, unpack

GROUP = 32  # tokens of a key channel, channels of a value, that share a range


def quantize_groups(x: Tensor, bits: int, axis: int, size: int = GROUP) -> tuple[Tensor, Tensor]:
    r"""Rounds groups of ``size`` entries along an axis: :math:`q = \mathrm{round}((x - \min)/s)`.

    With :math:`s = (\max - \min)/(2^b - 1)`; the error is at most s/2, and a constant group is exact.

    Args:
        x: ``[batch, heads, tokens, d]``.
        bits: 8, 4 or 2.
        axis: -2 for keys (tokens share a range), -1 for values (channels do).
        size: Entries of a group, a divisor of the axis.

    Returns:
        Codes packed along the last axis, uint8, and float16 minimum and scale ``[..., 2]`` with one entry per group
        where the axis was.

    Raises:
        LossplugError: The axis is no multiple of ``size``.
    """
    if x.shape[axis] % size:
        raise LossplugError(f"{x.shape[axis]} is no multiple of the group of {size}", where="quantize_groups")
    grouped = x.float().unflatten(axis, (-1, size))
    low, high = grouped.aminmax(dim=axis, keepdim=True)
    ranges = torch.stack([low, (high - low) / (2**bits - 1)], dim=-1).half()
    low, scale = ranges.float().unbind(-1)
    levels = ((grouped - low) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 2**bits - 1)
    flat = levels.flatten(axis - 1, axis).to(torch.uint8)
    return pack(flat, bits), ranges.squeeze(axis - 1)


def dequantize_groups(packed: Tensor, ranges: Tensor, bits: int, axis: int, width: int, dtype: torch.dtype) -> Tensor:
    """Undoes :func:`quantize_groups`, for ``width`` channels."""
    levels = unpack(packed, width, bits)
    low, scale = ranges.to(dtype).unsqueeze(axis - 1).unbind(-1)
    groups = low.shape[axis - 1]
    return torch.addcmul(low, levels.to(dtype).unflatten(axis, (groups, -1)), scale).flatten(axis - 1, axis)


def check_residual(bits: int, residual: int) -> None:
    """Checks the settings of a cache.

    Raises:
        LossplugError: Bits other than 8, 4, 2, or a residual that is no multiple of 32.
    """
    if check_bits("KIVICache", bits) == 16:
        raise LossplugError("bits is 16, which rounds nothing", where="KIVICache", remedy="Use DynamicCache")
    if isinstance(residual, bool) or not isinstance(residual, int) or residual < GROUP or residual % GROUP:
        raise LossplugError(
            f"residual is {residual!r}, allowed are multiples of the group of {GROUP}", where="KIVICache"
        )


def kivi_token_bytes(width: int, bits: int, value_group: int = GROUP) -> float:
    """Returns the bytes of a rounded token of one head, keys and values of ``width`` channels."""
    codes = 2 * -(-width * bits // 8)
    return codes + 4 * width / GROUP + 4 * width / value_group
