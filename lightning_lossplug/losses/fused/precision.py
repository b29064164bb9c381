"""Which dtype the matrix products of a linear head run in, and which its statistics."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError

LOW = (torch.float16, torch.bfloat16)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float32 for half-precision products, the dtype itself otherwise."""
    return torch.float32 if dtype in LOW else dtype


@cache
def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Returns the dtype of the products ``hidden @ weight.T`` and of their gradients.

    Under autocast that is autocast's dtype. A CPU without instructions for a half-precision dtype multiplies it 5 to 70
    times slower than float32, so there the tiles are converted to float32 first.

    Raises:
        LossplugError: Hidden states and weight differ in dtype, and autocast is off.
    """
    kind = hidden.device.type
    dtypes = {hidden.dtype, weight.dtype}
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise LossplugError(
            f"hidden states are {hidden.dtype}, the weight is {weight.dtype}; expected floating dtypes",
            where="fused_linear",
        )
    if torch.is_autocast_enabled(kind) and torch.float64 not in dtypes:
        dtype = torch.get_autocast_dtype(kind)
    elif len(dtypes) > 1:
        raise LossplugError(
            f"hidden states are {hidden.dtype}, the weight is {weight.dtype}",
            where="fused_linear",
            remedy="Convert one of them, or run under torch.autocast",
        )
    else:
        dtype = hidden.dtype
    if kind == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not _cpu_multiplies_bfloat16())):
        return torch.float32
    return dtype
