"""SR-STE's pull of pruned weights to zero (arXiv 2102.04010), through the gradient or beside the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor


def srste_penalty_(grad: Tensor, weight: Tensor, mask: Tensor, lambda_w: float) -> Tensor:
    """Adds ``lambda_w (1 - mask) W`` to a gradient, in place; kept weights receive exactly what they had.

    Args:
        grad: Gradient that the optimizer is about to use: synchronised, unscaled, clipped.
        weight: Dense weight of the same shape.
        mask: Boolean mask, True where kept.
        lambda_w: Strength >= 0; 2e-4 in the paper's code.
    """
    return grad.add_(torch.where(mask, 0, weight), alpha=lambda_w)


def srste_decay_(weight: Tensor, mask: Tensor, lambda_w: float, lr: float) -> Tensor:
    """Multiplies pruned weights by ``1 - lr lambda_w``, in place: the same pull outside the optimizer's moments."""
    return weight.copy_(torch.where(mask, weight, weight * (1 - lr * lambda_w)))
