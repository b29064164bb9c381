"""Log-sum-exp over the rows and columns of a similarity matrix that is never formed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError


class _TiledLSE(torch.autograd.Function):
    """One pass over tiles forward (both directions together), one with recomputed tiles backward."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, row_tile: int, col_tile: int, columns: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows = a.new_full((a.shape[0],), -torch.inf)
        cols = a.new_full((b.shape[0],), -torch.inf)
        for i, j in _tiles(a, b, row_tile, col_tile):
            x = (a[i] @ b[j].T).mul_(scale)
            rows[i] = torch.logaddexp(rows[i], x.logsumexp(dim=1))
            if columns:
                cols[j] = torch.logaddexp(cols[j], x.logsumexp(dim=0))
        ctx.save_for_backward(a, b, scale, rows, cols)
        ctx.tile, ctx.columns = (row_tile, col_tile), columns
        return rows, cols if columns else None

    @staticmethod
    def backward(ctx: Any, g_rows: Tensor, g_cols: Tensor | None) -> tuple[Any, ...]:
        # once_differentiable would let create_graph=True pass with a silent zero, as g_rows is often a constant
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise LossplugError(
                "the tiled contrastive loss has no second derivative",
                where="create_graph=True",
                remedy="Use info_nce with backend='dense'",
            )
        a, b, scale, rows, cols = ctx.saved_tensors
        need_a, need_b, need_scale = ctx.needs_input_grad[:3]
        grad_a = torch.zeros_like(a) if need_a else None
        grad_b = torch.zeros_like(b) if need_b else None
        grad_scale = torch.zeros_like(scale) if need_scale else None
        for i, j in _tiles(a, b, *ctx.tile):
            s = a[i] @ b[j].T
            p = (s * scale - rows[i, None]).exp_().mul_(g_rows[i, None])
            if g_cols is not None and ctx.columns:
                p += (s * scale - cols[None, j]).exp_().mul_(g_cols[None, j])
            if grad_scale is not None:
                grad_scale += torch.vdot(p.reshape(-1), s.reshape(-1))
            p *= scale
            if grad_a is not None:
                grad_a[i] += p @ b[j]
            if grad_b is not None:
                grad_b[j] += p.T @ a[i]
        return grad_a, grad_b, grad_scale, None, None, None


def _tiles(a: Tensor, b: Tensor, row_tile: int, col_tile: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, a.shape[0], row_tile):
        for j in range(0, b.shape[0], col_tile):
            yield slice(i, i + row_tile), slice(j, j + col_tile)


def tiled_lse(
    a: Tensor, b: Tensor, scale: Tensor, row_tile: int, col_tile: int, columns: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns ``logsumexp(scale * a b^T)`` over columns and, where ``columns``, over rows.

    Memory is that of the inputs, their gradients and one tile; backward costs one more matrix product (recompute).
    No second derivative: ``create_graph=True`` raises :class:`LossplugError`.

    Args:
        a: Rows [R, D], float32 or float64.
        b: Columns [C, D].
        scale: A 0-dimensional tensor.
        row_tile: Rows of a tile.
        col_tile: Columns of a tile.
        columns: Whether the second result is wanted.

    Returns:
        [R], and [C] or None; ``-inf`` for an empty sum.
    """
    return _TiledLSE.apply(a, b, scale, row_tile, col_tile, columns)
