"""What the forward pass reads of a masked weight, and which gradient the dense weight receives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _MaskedSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _DecayedSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: Tensor, masked: bool) -> Tensor:
        if masked:
            ctx.save_for_backward(mask, decay)
        ctx.masked = masked
        return torch.where(mask, weight, weight * decay)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.masked:
            mask, decay = ctx.saved_tensors
            grad = torch.where(mask, grad, grad * decay)
        return grad, None, None, None


def masked_ste(weight: Tensor, mask: Tensor) -> Tensor:
    """Returns ``W * mask``; the gradient passes to ``W`` unchanged (straight-through).

    Args:
        weight: Dense weight.
        mask: Boolean mask of its shape, True where kept.
    """
    return _MaskedSTE.apply(weight, mask)


def decayed_ste(weight: Tensor, mask: Tensor, decay: Tensor | float, grad_mode: str = "ste") -> Tensor:
    """Returns ``W * [mask + D (1 - mask)]``.

    Args:
        weight: Dense weight.
        mask: Boolean mask of its shape, True where kept.
        decay: The factor D in [0, 1] of the pruned weights; a tensor without dimensions changes without recompiling.
        grad_mode: ``ste``: the gradient passes unchanged; ``masked``: the true derivative ``g * [mask + D (1 - mask)]``.
    """
    decay = torch.as_tensor(decay, device=weight.device).to(weight.dtype)
    return _DecayedSTE.apply(weight, mask, decay, grad_mode == "masked")


def srste_penalty_(grad: Tensor, weight: Tensor, mask: Tensor, lambda_w: float) -> Tensor:
    """Adds SR-STE's term ``lambda_w (1 - mask) W`` to a gradient, in place (arXiv 2102.04010)."""
    return grad.add_(torch.where(mask, 0, weight), alpha=lambda_w)


def srste_decay_(weight: Tensor, mask: Tensor, lambda_w: float, lr: float) -> Tensor:
    """Shrinks pruned weights by ``1 - lr lambda_w``, in place: SR-STE's term outside the optimizer's moments."""
    return weight.copy_(torch.where(mask, weight, weight * (1 - lr * lambda_w)))
