"""Statistics of a linear head's logits by vocabulary tiles, with a backward that recomputes them.

Memory: one tile of logits besides the gradients. Cost: four matrix products of the size of the head, where the
materialised loss takes three. The gradient of the weight is written one tile at a time from all rows, so nothing is
accumulated in half precision. The backward takes any gradient per row, hence serves every reduction, any loss of the
statistics, and repeated backward calls.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lossplug.losses.fused.blocks import Coefficients, Scratch, Tile, reduce_tile, write_gradient
from lightning_lossplug.losses.fused.precision import product_dtype, statistics_dtype
from lightning_lossplug.losses.stats import LogitStats

TILE_ELEMENTS = 1 << 24  # 64 MB of float32 logits


def tile_width(rows: int, classes: int) -> int:
    """Returns the default number of columns of a tile: 4096 for 4096 rows, less for more rows."""
    width = TILE_ELEMENTS // max(rows, 1)
    return max(1, min(classes, max(128, min(8192, 1 << max(width, 1).bit_length() - 1))))


def tile_logits(h: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, out: Tensor) -> Tensor:
    """Writes raw logits of some columns into ``out`` [R, T], in the dtype of ``h``."""
    w = weight[columns].to(h.dtype)
    if bias is None:
        return torch.mm(h, w.T, out=out)
    return torch.addmm(bias[columns].to(h.dtype), h, w.T, out=out)


def locate(y: Tensor, columns: slice, u: Tensor | None, softcap: float | None) -> Tile:
    """Returns where the labels lie in a tile."""
    index = (y - columns.start).clamp_(0, columns.stop - columns.start - 1)[:, None]
    inside = (y >= columns.start) & (y < columns.stop)
    return Tile(index, inside, None if u is None else u[columns], softcap)


class _TiledStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        u: Tensor | None,
        softcap: float | None,
        needs: Collection[str],
        width: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        h = hidden.to(dtype)
        rows, classes = h.shape[0], weight.shape[0]
        starts = range(0, classes, width)
        tile_lse = h.new_empty((len(starts), rows), dtype=statistics_dtype(dtype))
        target = torch.zeros_like(tile_lse[0])
        total = torch.zeros_like(target) if "sum" in needs else None
        sumsq = torch.zeros_like(target) if "sumsq" in needs else None
        buffer = h.new_empty(rows * width)
        scratch = Scratch(rows, width, h)
        u = None if u is None else u.to(target)
        for k, start in enumerate(starts):
            columns = slice(start, min(start + width, classes))
            z = buffer[: rows * (columns.stop - start)].view(rows, -1)
            tile_logits(h, weight, bias, columns, z)
            tile = locate(y, columns, u, softcap)
            tile_lse[k], picked, part, square = reduce_tile(z, tile, total is not None, sumsq is not None, scratch)
            target = torch.where(tile.inside, picked, target)  # type: ignore[arg-type]
            if total is not None and part is not None:
                total += part
            if sumsq is not None and square is not None:
                sumsq += square
        lse = tile_lse.logsumexp(dim=0)
        ctx.save_for_backward(hidden, weight, bias, y, u, lse, tile_lse, target)
        ctx.softcap, ctx.width, ctx.dtype = softcap, width, dtype
        ctx.set_materialize_grads(False)
        return lse, target, total, sumsq

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 9
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return (*_backward(ctx, Coefficients(*grads)), None, None, None, None, None, None)


def _backward(ctx: Any, coefficients: Coefficients) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias."""
    hidden, weight, bias, y, u, lse, tile_lse, target = ctx.saved_tensors
    need_h, need_w, need_b = ctx.needs_input_grad[:3]
    exact = statistics_dtype(ctx.dtype)
    h = hidden.to(ctx.dtype)
    rows, classes = h.shape[0], weight.shape[0]
    d_hidden = h.new_zeros(h.shape, dtype=exact) if need_h else None
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_w else None
    d_bias = h.new_zeros(classes, dtype=exact) if need_b else None
    # Gradient of each row's label column, collected over the tiles and applied without a rounding to half precision.
    label = torch.zeros_like(lse)
    if coefficients.target is not None:
        slope = 1 if ctx.softcap is None else 1 - (target / ctx.softcap).square()
        label += coefficients.target * slope
    order = torch.argsort(y)
    starts = range(0, classes, ctx.width)
    bounds = torch.searchsorted(y[order], torch.tensor([*starts, classes], device=y.device)).tolist()
    buffer = h.new_empty(rows * ctx.width)
    scratch = Scratch(rows, ctx.width, h)
    for k, start in enumerate(starts):
        columns = slice(start, min(start + ctx.width, classes))
        z = buffer[: rows * (columns.stop - start)].view(rows, -1)
        tile_logits(h, weight, bias, columns, z)
        tile = locate(y, columns, u, ctx.softcap)
        column_sum = None if d_bias is None else d_bias[columns]
        label += write_gradient(z, tile, lse, tile_lse[k], coefficients, scratch, column_sum)
        if d_hidden is not None:
            add_product(d_hidden, z, weight[columns].to(ctx.dtype))
        if d_weight is not None:
            mine = order[bounds[k] : bounds[k + 1]]
            source = hidden[mine].to(exact) * label[mine, None]
            write_product(d_weight[columns], z.T, h, y[mine] - start, source)
    if d_hidden is not None:
        add_rows(d_hidden, weight, y, label)
        d_hidden = d_hidden.to(hidden.dtype)
    if d_bias is not None:
        d_bias = d_bias.index_add_(0, y, label).to(bias.dtype)
    return d_hidden, d_weight, d_bias


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, where half-precision products are added up in the dtype of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))


def write_product(out: Tensor, a: Tensor, b: Tensor, index: Tensor, source: Tensor) -> None:
    """``out = a @ b`` plus the rows ``source`` added at ``index``, rounded to the dtype of ``out`` at the end."""
    if a.dtype == out.dtype == source.dtype:
        torch.mm(a, b, out=out)
        out.index_add_(0, index, source)
    else:
        out.copy_(torch.mm(a, b).to(source.dtype).index_add_(0, index, source))


def add_rows(total: Tensor, weight: Tensor, y: Tensor, scale: Tensor, block: int = 1024) -> None:
    """``total[i] += scale[i] * weight[y[i]]``, a block of rows at a time."""
    for i in range(0, y.numel(), block):
        rows = slice(i, i + block)
        total[rows].addcmul_(weight[y[rows]].to(total.dtype), scale[rows, None])


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    needs: Collection[str] = (),
    u: Tensor | None = None,
    tile: int | None = None,
) -> LogitStats:
    """Returns the statistics of the logits ``c tanh((hidden W^T + bias) / c)`` without holding the logits.

    Args:
        hidden: [R, D].
        weight: Classifier [V, D].
        y: Class indices in [0, V), [R].
        bias: [V].
        softcap: ``c`` > 0; None: plain logits.
        needs: Which of ``sum`` and ``sumsq`` to compute besides ``lse`` and ``target``.
        u: Weights [V] of the sum; None: ones.
        tile: Columns per tile.
    """
    return tiled_stats(hidden, weight, bias, y, u, softcap, needs, tile, product_dtype(hidden, weight))


def tiled_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    u: Tensor | None,
    softcap: float | None,
    needs: Collection[str],
    tile: int | None,
    dtype: torch.dtype,
) -> LogitStats:
    """:func:`linear_stats` with the dtype of the products given."""
    width = tile_width(hidden.shape[0], weight.shape[0]) if tile is None else min(tile, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        lse, target, total, sumsq = _TiledStats.apply(
            hidden, weight, bias, y, u, softcap, frozenset(needs), width, dtype
        )
    return LogitStats(lse, target, weight.shape[0], total, sumsq)
