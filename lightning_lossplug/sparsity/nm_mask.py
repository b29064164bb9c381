"""Magnitude N:M projection (placeholder kernel)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError


def nm_mask(weight: Tensor, n: int, m: int, dim: str | int = "in", scores: Tensor | None = None) -> Tensor:
    s = (weight.abs() if scores is None else scores).movedim(1 if dim == "in" else dim, -1)
    if not bool(s.isfinite().all()):
        raise LossplugError("the weight holds non-finite values")
    g = s.reshape(-1, m)
    order = g.argsort(dim=1, descending=True, stable=True)[:, :n]
    out = torch.zeros_like(g, dtype=torch.bool).scatter_(1, order, True).reshape(s.shape)
    return out.movedim(-1, 1 if dim == "in" else dim)
