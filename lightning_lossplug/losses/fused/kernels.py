"""Triton kernels of the elementwise passes over a tile of logits, for GPUs; the matrix products stay those of torch.

The same functions as in :mod:`lightning_lossplug.losses.fused.blocks`, in one or two reads of the tile and without any
float32 copy of it. Imported only where Triton is installed and the tile lies on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

REDUCE_BLOCK = 4096
WRITE_BLOCK = 2048


@triton.jit
def _capped(x, softcap):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    e = tl.exp(-2.0 * tl.abs(x) / softcap)
    t = (1.0 - e) / (1.0 + e)
    return softcap * tl.where(x < 0, -t, t)


@triton.jit
def _reduce(  # type: ignore[no-untyped-def] # noqa: ANN202
    z,  # noqa: ANN001
    stride,  # noqa: ANN001
    u,  # noqa: ANN001
    lse,  # noqa: ANN001
    total,  # noqa: ANN001
    sumsq,  # noqa: ANN001
    columns,  # noqa: ANN001
    softcap,  # noqa: ANN001
    CAP: tl.constexpr,
    SUM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    z += row.to(tl.int64) * stride
    top = float("-inf")
    mass = 0.0
    linear = 0.0
    square = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        x = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        if CAP:
            x = _capped(x, softcap)
        if SUM:
            if WEIGHTED:
                linear += tl.sum(x * tl.load(u + at, mask=inside, other=0.0), 0)
            else:
                linear += tl.sum(x, 0)
        if SQUARES:
            square += tl.sum(x * x, 0)
        x = tl.where(inside, x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 0))
        # A block of nothing but -inf leaves the maximum at -inf, and inf - inf must not enter the sum.
        shift = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = new
    tl.store(lse + row, top + tl.log(mass))
    if SUM:
        tl.store(total + row, linear)
    if SQUARES:
        tl.store(sumsq + row, square)


@triton.jit
def _write(  # type: ignore[no-untyped-def] # noqa: ANN202
    z,  # noqa: ANN001
    stride,  # noqa: ANN001
    column,  # noqa: ANN001
    u,  # noqa: ANN001
    lse,  # noqa: ANN001
    by_lse,  # noqa: ANN001
    by_sum,  # noqa: ANN001
    by_sumsq,  # noqa: ANN001
    at_label,  # noqa: ANN001
    columns,  # noqa: ANN001
    softcap,  # noqa: ANN001
    CAP: tl.constexpr,
    LSE: tl.constexpr,
    SUM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    z += row.to(tl.int64) * stride
    x = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        x = _capped(x, softcap)
    g = tl.zeros([BLOCK], tl.float32)
    if LSE:
        g = tl.exp(x - tl.load(lse + row)) * tl.load(by_lse + row)
    if SUM:
        slope = tl.load(by_sum + row)
        if WEIGHTED:
            g += slope * tl.load(u + at, mask=inside, other=0.0)
        else:
            g += slope
    if SQUARES:
        g += 2.0 * tl.load(by_sumsq + row) * x
    if CAP:
        g *= 1.0 - (x / softcap) * (x / softcap)
    mine = at == tl.load(column + row)  # -1 where the label is in another tile
    tl.store(at_label + row + at * 0, g, mask=mine)
    tl.store(z + at, tl.where(mine, 0.0, g).to(z.dtype.element_ty), mask=inside)


def reduce_rows(
    z: Tensor, u: Tensor | None, softcap: float | None, need_sum: bool, need_sumsq: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns log-sum-exp, sum and sum of squares of each row of a tile [R, T], [R] float32 each."""
    rows, columns = z.shape
    lse = z.new_empty(rows, dtype=torch.float32)
    total = torch.empty_like(lse) if need_sum else None
    sumsq = torch.empty_like(lse) if need_sumsq else None
    with torch.cuda.device_of(z):
        _reduce[(rows,)](
            z, z.stride(0), u if u is not None else lse, lse,
            total if total is not None else lse, sumsq if sumsq is not None else lse, columns,
            1.0 if softcap is None else softcap,
            CAP=softcap is not None, SUM=need_sum, WEIGHTED=u is not None, SQUARES=need_sumsq,
            BLOCK=min(REDUCE_BLOCK, triton.next_power_of_2(columns)), num_warps=8,
        )  # fmt: skip
    return lse, total, sumsq


def write_rows(
    z: Tensor,
    column: Tensor,
    inside: Tensor | None,
    u: Tensor | None,
    softcap: float | None,
    lse: Tensor,
    by_lse: Tensor | None,
    by_sum: Tensor | None,
    by_sumsq: Tensor | None,
) -> Tensor:
    """Overwrites a tile of raw logits by its gradient, zero at the label; returns the label's entries [R]."""
    rows, columns = z.shape
    at_label = torch.zeros_like(lse)
    label = column.reshape(-1) if inside is None else torch.where(inside, column.reshape(-1), -1)
    block = min(WRITE_BLOCK, triton.next_power_of_2(columns))

    def or_any(tensor: Tensor | None) -> Any:
        return lse if tensor is None else tensor.contiguous()

    with torch.cuda.device_of(z):
        _write[(rows, triton.cdiv(columns, block))](
            z, z.stride(0), label.contiguous(), or_any(u), lse, or_any(by_lse), or_any(by_sum), or_any(by_sumsq),
            at_label, columns, 1.0 if softcap is None else softcap,
            CAP=softcap is not None, LSE=by_lse is not None, SUM=by_sum is not None, WEIGHTED=u is not None,
            SQUARES=by_sumsq is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return at_label
