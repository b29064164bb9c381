"""From the weight to what the forward pass uses: masked or attenuated entries, with a gradient of choice."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.sparsity.bits import attenuated, masked, pack_rows, unpack_rows

GradMode = Literal["ste", "masked"]
GRAD_MODES = ("ste", "masked")


def masked_ste(weight: Tensor, mask: Tensor) -> Tensor:
    """Returns ``W~ = W * mask``; the gradient goes through as if there were no mask (straight-through estimator).

    Pruned entries are ``+0.0`` whatever the weight holds. Nothing is saved for the backward pass.

    Args:
        weight: Floating-point tensor.
        mask: Bool tensor of the same shape, true where an entry is kept.

    Raises:
        LossplugError: The mask isn't boolean or has another shape.

    Source: Bengio et al. 2013, arXiv 1308.3432; N:M form in Zhou et al. 2021, arXiv 2102.04010.
    """
    _require_mask(weight, mask)
    return _STE.apply(weight, mask, None)


def decayed_ste(weight: Tensor, mask: Tensor, decay: float | Tensor, grad_mode: GradMode = "ste") -> Tensor:
    """Returns ``W~ = W * (mask + decay * (1 - mask))``: pruned entries are attenuated, not removed.

    With ``decay == 1`` the result is the weight, with ``decay == 0`` pruned entries are ``+0.0``.

    Args:
        weight: Floating-point tensor.
        mask: Bool tensor of the same shape, true where an entry is kept.
        decay: Number in [0, 1], or a 0-dim tensor: then a new value doesn't recompile a compiled model. It gets no
            gradient.
        grad_mode: ``"ste"`` hands the incoming gradient ``g`` through, ``"masked"`` gives the derivative
            ``g * (mask + decay * (1 - mask))``.

    Raises:
        LossplugError: The mask isn't boolean or has another shape, ``decay`` isn't a single value in [0, 1], or the
            mode is unknown.

    Source: Bambhaniya et al. 2024, arXiv 2402.04744, section 3.
    """
    _require_mask(weight, mask)
    if grad_mode not in GRAD_MODES:
        raise LossplugError(f"unknown grad_mode {grad_mode!r}", remedy=suggestion(str(grad_mode), GRAD_MODES))
    if isinstance(decay, Tensor):
        if decay.ndim:
            raise LossplugError(f"decay has shape {tuple(decay.shape)}", remedy="Give a number or a 0-dim tensor")
        decay = decay.detach().to(weight.device)
    elif not 0 <= decay <= 1:
        raise LossplugError(f"decay={decay} is outside [0, 1]", remedy="1 leaves the weight dense, 0 prunes it")
    return (_STE if grad_mode == "ste" else _Masked).apply(weight, mask, decay)


def packed_ste(weight: Tensor, bits: Tensor, decay: Tensor | None = None, grad_mode: GradMode = "ste") -> Tensor:
    """Returns :func:`decayed_ste` (:func:`masked_ste` where ``decay`` is None) for a mask in bits.

    Args:
        weight: Floating-point tensor.
        bits: The mask by :func:`~lightning_lossplug.sparsity.bits.pack_rows`.
        decay: 0-dim tensor on the weight's device, or None for 0.
        grad_mode: ``"ste"`` or ``"masked"``.
    """
    return (_STE if grad_mode == "ste" else _Masked).apply(weight, bits, decay)


def _require_mask(weight: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise LossplugError(
            f"the mask has dtype {mask.dtype} and shape {tuple(mask.shape)}, the weight shape {tuple(weight.shape)}",
            remedy="Give a bool mask of the weight's shape",
        )


def attenuate(values: Tensor, mask: Tensor, decay: float | Tensor | None) -> Tensor:
    """Multiplies pruned entries by ``decay``; the mask is bool, or in bits."""
    if values.ndim and values.device.type == "cpu" and not torch.compiler.is_compiling():
        bits = mask if mask.dtype == torch.uint8 else pack_rows(mask)
        if decay is None or float(decay) == 0:
            return masked(values, bits)
        if values.dtype in (torch.float32, torch.float64):  # a factor in 16 bits would be a rounded one
            return attenuated(values, bits, float(decay))
    if mask.dtype == torch.uint8:
        mask = unpack_rows(mask, values.shape)
    if decay is None:
        return torch.where(mask, values, 0.0)
    scaled = values * decay
    # A product with zero may be -0.0 or NaN; 0-dim, so that a tensor's value needn't be known here.
    if isinstance(decay, Tensor):
        scaled.masked_fill_(decay == 0, 0.0)
    elif decay == 0:
        scaled.zero_()
    return torch.where(mask, values, scaled, out=scaled)


class _STE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float | Tensor | None) -> Tensor:
        return attenuate(weight, mask, decay)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float | Tensor | None) -> Tensor:
        ctx.save_for_backward(mask, decay if isinstance(decay, Tensor) else None)
        ctx.decay = None if isinstance(decay, Tensor) else decay
        return attenuate(weight, mask, decay)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        mask, decay = ctx.saved_tensors
        return attenuate(grads[0], mask, ctx.decay if decay is None else decay), None, None
