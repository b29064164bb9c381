"""A loss of a linear head by row chunks, its gradients formed in the forward pass.

A chunk holds whole rows of logits, so the loss of each row and the gradient by its logits are known at once, and the
chunk turns in place from logits into their gradient: three matrix products, as in the materialised loss. The gradient
of the weight is summed over the chunks in float32 (in place in the result where that is float32). Backward multiplies
by the scalar that comes in; a second backward recomputes by vocabulary tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lossplug.losses.fused.blocks import Scratch, Tile, linear_rows, reduce_tile, softmax_rows, write_gradient
from lightning_lossplug.losses.fused.gradients import HeadGradients, narrowed, row_logits, scalar
from lightning_lossplug.losses.fused.objective import Objective
from lightning_lossplug.losses.fused.precision import product_dtype, statistics_dtype
from lightning_lossplug.losses.fused.tiles import tiled_stats
from lightning_lossplug.losses.stats import LogitStats

CHUNK_BYTES = 64 << 20  # a chunk may always be this large
CHUNK_SHARE = 9  # else at most this part of float32 logits of all rows, 1/27 of the memory of the materialised loss
CHUNK_ROWS = 1024  # more rows make the matrix products no faster


def chunk_rows(rows: int, classes: int, itemsize: int) -> int:
    """Returns the number of rows of a chunk, the chunks being of nearly equal size."""
    share = 4 * rows // (CHUNK_SHARE * itemsize)
    most = max(CHUNK_BYTES // (classes * itemsize), min(share, CHUNK_ROWS), 1)
    return -(-rows // -(-rows // most))


class _RowChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        objective: Objective,
        factor: Tensor,
        softcap: float | None,
        size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        h, w, exact = hidden.to(dtype), narrowed(weight, dtype), statistics_dtype(dtype)
        rows, classes = h.shape[0], w.shape[0]
        needs, u = objective.loss.needs, objective.u
        u = None if u is None else u.to(exact)
        gradients = HeadGradients(hidden, weight, w, bias, ctx.needs_input_grad, dtype, u)
        # The gradient is linear in the logits, or in the probabilities, which then take the place of the logits.
        plain = softcap is None and gradients.bias is None
        linear, simple = plain and objective.loss.spherical, plain and "sumsq" not in needs
        chunk, scratch = h.new_empty(size, classes), Scratch(size, classes, h)
        value = h.new_zeros((), dtype=torch.float64)
        for i in range(0, rows, size):
            part = slice(i, min(i + size, rows))
            z, y = chunk[: part.stop - i], objective.y[part]
            row_logits(h[part], w, bias, z)
            if linear:
                target, total, sumsq = linear_rows(z, y[:, None], u, "sum" in needs, "sumsq" in needs, scratch)
                lse = torch.zeros_like(target)
                stats = LogitStats(lse, target, classes, total, sumsq)
            elif simple:
                lse, target, total, label = softmax_rows(z, y[:, None], u, "sum" in needs, scratch)
                stats = LogitStats(lse, target, classes, total)
            else:
                tile = Tile(y[:, None], None, u, softcap)
                lse, target, total, sumsq = reduce_tile(z, tile, "sum" in needs, "sumsq" in needs, scratch)
                stats = LogitStats(lse, target, classes, total, sumsq)
            loss, grads = objective.differentiate(stats, part, factor)
            value += loss
            by_target = torch.zeros_like(lse) if grads.target is None else grads.target
            if linear:
                scale = torch.zeros_like(lse) if grads.sumsq is None else 2 * grads.sumsq
                gradients.add(part, z, y, target * scale + by_target, scale, grads.sum)
            elif simple:
                scale = torch.zeros_like(lse) if grads.lse is None else grads.lse
                gradients.add(part, z, y, label * scale + by_target, scale, grads.sum)
            else:
                label = write_gradient(z, tile, lse, lse, grads, scratch, gradients.bias)
                slope = 1 if softcap is None else 1 - (target / softcap).square()
                gradients.add(part, z, y, label + by_target * slope)
        gradients.close()
        ctx.save_for_backward(hidden, weight, bias)
        ctx.objective, ctx.factor, ctx.softcap, ctx.dtype = objective, factor, softcap, dtype
        ctx.gradients = gradients
        return (value * factor.double()).to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # handed over, not kept: .grad then takes them without a copy
        found = _again(ctx, upstream) if gradients is None else gradients.times(scalar(upstream))
        return (*found, None, None, None, None, None)


def _again(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a second backward, by vocabulary tiles."""
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(needed)
        for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    ]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    objective: Objective = ctx.objective
    needs, y, u = objective.loss.needs, objective.y, objective.u
    with torch.enable_grad():
        hidden, weight, bias = leaves
        stats = tiled_stats(hidden, weight, bias, y, u, ctx.softcap, needs, None, ctx.dtype)  # type: ignore[arg-type]
        total = objective.rows(stats).sum()
        found = iter(torch.autograd.grad(total, wanted, (upstream * ctx.factor).to(total)))
    return tuple(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves)


def rows_total(
    hidden: Tensor,
    weight: Tensor,
    objective: Objective,
    factor: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Returns ``factor`` times the summed loss of the rows, its gradients ready for backward.

    Args:
        hidden: [R, D].
        weight: Classifier [V, D].
        objective: Loss, labels and weights.
        factor: Scalar; no gradient flows into it.
        bias: [V].
        softcap: ``c`` > 0 of ``c tanh(z / c)``; None: plain logits.
        chunk: Rows per chunk.
    """
    dtype = product_dtype(hidden, weight)
    size = chunk_rows(hidden.shape[0], weight.shape[0], dtype.itemsize) if chunk is None else chunk
    with torch.autocast(hidden.device.type, enabled=False):
        return _RowChunks.apply(hidden, weight, bias, objective, factor, softcap, min(size, hidden.shape[0]), dtype)
