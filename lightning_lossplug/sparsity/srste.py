"""SR-STE's pull of pruned weights to zero (arXiv 2102.04010), through the gradient or beside the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.sparsity.bits import factors, pack_rows
from lightning_lossplug.sparsity.native import native, pull, scale


def srste_penalty_(grad: Tensor, weight: Tensor, mask: Tensor, lambda_w: float) -> Tensor:
    """Adds ``lambda_w (1 - mask) W`` to a gradient, in place; kept weights receive exactly what they had.

    Args:
        grad: Gradient that the optimizer is about to use: synchronised, unscaled, clipped.
        weight: Dense weight of the same shape.
        mask: Boolean mask, True where kept, or its bits (``pack_rows``).
        lambda_w: Strength >= 0; 2e-4 in the paper's code.
    """
    bits = _bits(mask)
    if grad.dtype == weight.dtype and grad.element_size() > 2 and (library := native(grad, weight, bits)) is not None:
        return pull(library, grad, weight, bits, lambda_w)
    return grad.addcmul_(weight.to(grad.dtype), factors(bits, grad, 0.0, lambda_w))


def srste_decay_(weight: Tensor, mask: Tensor, lambda_w: float, lr: float) -> Tensor:
    """Multiplies pruned weights by ``1 - lr lambda_w``, in place: the same pull outside the optimizer's moments."""
    bits = _bits(mask)
    if weight.element_size() > 2 and (library := native(weight, bits)) is not None:
        return scale(library, weight, bits, weight, 1.0, 1 - lr * lambda_w)
    return weight.mul_(factors(bits, weight, 1.0, 1 - lr * lambda_w))


def _bits(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.uint8 else pack_rows(mask)
