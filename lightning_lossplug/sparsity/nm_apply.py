"""Mask, masked weight and pull for a loop of one's own: one pass over the weight on a GPU with Triton."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity._select import uses_kernel
from lightning_lossplug.sparsity.bits import pack_rows, row_length
from lightning_lossplug.sparsity.nm_mask import grouped, nm_mask, require_finite, require_groups
from lightning_lossplug.sparsity.srste import srste_penalty_
from lightning_lossplug.sparsity.ste import decayed_ste


@register(
    "function",
    "nm_apply",
    family="nm_sparsity",
    paper="Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
    arxiv="2102.04010",
)
@torch.no_grad()
def nm_apply(
    weight: Tensor,
    n: int,
    m: int,
    dim: Literal["in"] | int = "in",
    decay: float = 0.0,
    grad: Tensor | None = None,
    lambda_w: float = 0.0,
    *,
    check_finite: bool = True,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the N:M mask and ``W (mask + decay (1 - mask))``; adds ``lambda_w (1 - mask) W`` to a gradient.

    Args:
        weight: As for :func:`~lightning_lossplug.sparsity.nm_mask`.
        n: Entries kept per group.
        m: Group size.
        dim: Axis of the groups.
        decay: Factor of pruned entries, in [0, 1]; with 0 they are ``+0.0``.
        grad: Changed in place, of the weight's shape; None: no pull.
        lambda_w: Strength of SR-STE's pull.
        check_finite: As for ``nm_mask``.
        packed: Return the mask as bits, uint8 ``[R, ceil(K / 8)]`` for R indices of the first axis and K entries each;
            :func:`~lightning_lossplug.sparsity.unpack_rows` undoes it. Groups along the last axis are written so by the
            kernel itself.

    Raises:
        LossplugError: As for ``nm_mask``, or ``decay`` outside [0, 1].
    """
    if not 0 <= decay <= 1:
        raise LossplugError(f"decay={decay} is outside [0, 1]", where="nm_apply")
    axis = require_groups(weight, n, m, dim)
    alike = grad is None or (grad.is_contiguous() and grad.dtype == weight.dtype)
    if n == m or not weight.is_contiguous() or not alike or not uses_kernel(weight, m):
        mask = nm_mask(weight, n, m, axis, check_finite=check_finite)
        if grad is not None:
            srste_penalty_(grad, weight, mask, lambda_w)
        return pack_rows(mask) if packed else mask, decayed_ste(weight, mask, decay)
    from lightning_lossplug.sparsity import kernels

    if check_finite:
        require_finite(weight, "weight")
    used, shape = torch.empty_like(weight), grouped(weight.shape, axis, m)
    direct = packed and shape[2] == 1 and row_length(weight.shape) % 8 == 0
    if direct:
        mask = torch.empty(len(weight), row_length(weight.shape) // 8, dtype=torch.uint8, device=weight.device)
    else:
        mask = torch.empty_like(weight, dtype=torch.bool)
    pulled = None if grad is None else grad.view(shape)
    kernels.fill(
        weight.detach().view(shape),
        n,
        mask if direct else mask.view(shape),
        used=used.view(shape),
        decay=decay,
        grad=pulled,
        pull=lambda_w,
    )
    return pack_rows(mask) if packed and not direct else mask, used
