"""Magnitude N:M projection."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity._select import fill_mask


@register(
    "mask",
    "nm_mask",
    family="nm_sparsity",
    paper="Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
    arxiv="2102.04010",
)
@torch.no_grad()
def nm_mask(
    weight: Tensor,
    n: int,
    m: int,
    dim: Literal["in"] | int = "in",
    scores: Tensor | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Returns the mask that keeps the N entries of largest magnitude in every M consecutive ones along an axis.

    Ties are decided by position, the lower index wins: on every device, in every dtype, run after run.

    Args:
        weight: Any floating dtype, at least one axis, any strides.
        n: Entries kept per group, 1 <= n <= m.
        m: Group size; divides the axis.
        dim: The axis of the groups; ``in`` is the reduction axis of Linear and Conv weights (axis 1, or 0 of a vector).
        scores: Saliency >= 0 of the shape of ``weight`` that takes the place of ``|weight|``.
        check_finite: Refuse NaN, infinities and negative scores (on an accelerator the check waits for the device).

    Returns:
        A boolean mask of the shape of ``weight``, True where kept.

    Raises:
        LossplugError: N, M, axis, scores or values that don't fit.
    """
    if not 1 <= n <= m:
        raise LossplugError(f"N:M is {n}:{m}", where="nm_mask", remedy="Choose 1 <= N <= M, for example 2:4")
    saliency = (weight if scores is None else scores).detach()
    if saliency.shape != weight.shape or weight.ndim == 0:
        shapes = f"scores {tuple(saliency.shape)} don't fit the weight {tuple(weight.shape)}"
        raise LossplugError(shapes, where="nm_mask", remedy="Give scores of the weight's shape, with at least one axis")
    if not saliency.is_floating_point():
        raise LossplugError(f"dtype {saliency.dtype} is not floating", where="nm_mask")
    if dim != "in" and not -weight.ndim <= dim < weight.ndim:
        raise LossplugError(f"dim is {dim} for a weight of {weight.ndim} axes", where="nm_mask")
    axis = min(1, weight.ndim - 1) if dim == "in" else dim % weight.ndim
    length = weight.shape[axis]
    if length % m:
        raise LossplugError(f"M = {m} does not divide the axis of {length}", where="nm_mask", remedy="Choose another M")
    if check_finite and not torch.compiler.is_compiling():
        require_saliency(saliency, signed=scores is None)
    if n == m or saliency.numel() == 0:
        return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    source = saliency.contiguous()
    mask = torch.empty(source.shape, dtype=torch.bool, device=source.device)
    grouped = (source.shape[:axis].numel() * (length // m), m, source.shape[axis + 1 :].numel())
    if torch.compiler.is_compiling():  # a compiler fuses the definition; it can't follow the cache-sized pieces
        order = source.view(grouped).abs().argsort(dim=1, descending=True, stable=True)[:, :n]
        return torch.zeros(grouped, dtype=torch.bool, device=source.device).scatter(1, order, True).view(source.shape)
    fill_mask(source.view(grouped), n, mask.view(grouped))
    return mask


def require_saliency(saliency: Tensor, *, signed: bool) -> None:
    """Raises :class:`LossplugError` for values that are not finite or, unless ``signed``, negative."""
    if saliency.numel() == 0:
        return
    low, high = saliency.aminmax()  # one fast pass: NaN and infinities reach at least one of the two
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~torch.isfinite(saliency)).sum())
        raise LossplugError(f"{bad} of {saliency.numel()} values are non-finite", where="nm_mask")
    if not signed and bool(low < 0):
        raise LossplugError("scores are negative", where="nm_mask", remedy="Give a saliency >= 0")
