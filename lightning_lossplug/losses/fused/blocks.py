"""Elementwise passes over a tile of logits, a few rows at a time so that the float32 scratch stays in the cache.

A tile [R, T] holds raw logits ``h W^T + b`` in the dtype of the matrix product. :func:`reduce_tile` reads its
statistics, :func:`write_gradient` turns it in place into the gradient by the raw logits, and :func:`softmax_rows` and
:func:`linear_rows` are the shorter ways where the gradient needs the probabilities or the logits alone. None of them
needs a float32 copy of the tile.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lossplug.losses.fused.precision import statistics_dtype

CACHE_BYTES = 4 << 20  # float32 scratch of one block on a CPU; a level-2 cache holds 1 to 2 MB per core


class Coefficients(NamedTuple):
    """Gradients of the loss with respect to the statistics of each row, [R] each; None: zero."""

    lse: Tensor | None
    target: Tensor | None
    sum: Tensor | None
    sumsq: Tensor | None


class Tile(NamedTuple):
    """What the passes have to know besides the logits.

    Args:
        column: Column of the label of each row, clamped into the tile, [R, 1].
        inside: Whether the label lies in the tile, [R]; None: all do.
        u: Weights of the sum statistic in the tile's columns, [T]; None: ones.
        softcap: ``c`` of ``c tanh(z / c)``, or None.
    """

    column: Tensor
    inside: Tensor | None
    u: Tensor | None
    softcap: float | None


class Scratch:
    """Two float32 (float64) buffers of one block; made once, used for every tile."""

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self.rows = block_rows(rows, columns, like)
        self.dtype, self.device, self.size = statistics_dtype(like.dtype), like.device, self.rows * columns
        self.buffers: Tensor | None = None

    def of(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Returns two contiguous views [rows, columns]."""
        if self.buffers is None:  # not at once: the kernels for GPUs do without
            self.buffers = torch.empty(2, self.size, dtype=self.dtype, device=self.device)
        first, second = self.buffers[:, : rows * columns].view(2, rows, columns)
        return first, second


def block_rows(rows: int, columns: int, like: Tensor) -> int:
    """Returns how many rows of a tile are worked on at a time."""
    if like.device.type != "cpu":
        return max(rows, 1)
    width = columns * statistics_dtype(like.dtype).itemsize
    return max(1, min(rows, max(2 * torch.get_num_threads(), CACHE_BYTES // width)))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_kernels(z: Tensor) -> bool:
    """Whether the passes over a tile are Triton kernels."""
    return z.is_cuda and z.dtype != torch.float64 and z.stride(1) == 1 and _has_triton()


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """Returns the logits that the loss sees, from raw ones."""
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def entries(column: Tensor, columns: int) -> Tensor:
    """Returns places of one entry per row in a flattened tile; writing there is faster than ``scatter_`` by far."""
    return torch.arange(0, len(column) * columns, columns, device=column.device) + column.squeeze(1)


def _load(z: Tensor, softcap: float | None, out: Tensor) -> Tensor:
    """Capped logits of a block in the statistics' dtype: in ``out``, or ``z`` itself where that is the same."""
    if softcap is None and z.dtype == out.dtype:
        return z
    out.copy_(z)
    return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)


def reduce_tile(
    z: Tensor, tile: Tile, need_sum: bool, need_sumsq: bool, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns log-sum-exp, target logit (garbage outside the tile), sum and sum of squares of each row, [R] each."""
    rows, columns = z.shape
    dtype = statistics_dtype(z.dtype)
    target = capped(z.gather(1, tile.column).squeeze(1).to(dtype), tile.softcap)
    if uses_kernels(z):
        from lightning_lossplug.losses.fused import kernels

        lse, total, sumsq = kernels.reduce_rows(z, tile.u, tile.softcap, need_sum, need_sumsq)
        return lse, target, total, sumsq
    lse = torch.empty_like(target)
    total = torch.empty_like(lse) if need_sum else None
    sumsq = torch.empty_like(lse) if need_sumsq else None
    for i in range(0, rows, scratch.rows):
        block = slice(i, min(i + scratch.rows, rows))
        first, second = scratch.of(block.stop - i, columns)
        s = _load(z[block], tile.softcap, first)
        # The softmax kernel is several times faster than logsumexp, and its largest value is 1 / sum exp(s - max).
        top = s.amax(dim=1)
        torch.softmax(s, dim=1, out=second)
        lse[block] = torch.where(top == -torch.inf, top, top - second.amax(dim=1).log_())
        if total is not None:
            total[block] = s.sum(dim=1) if tile.u is None else s @ tile.u
        if sumsq is not None:
            sumsq[block] = torch.linalg.vector_norm(s, dim=1).square_()
    return lse, target, total, sumsq


def softmax_rows(
    z: Tensor, index: Tensor, u: Tensor | None, need_sum: bool, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Turns whole rows of logits in place into probabilities, zero at the label.

    Returns:
        Log-sum-exp, target logit, sum (or None) and probability of the label of each row, [R] each.
    """
    rows, columns = z.shape
    dtype = statistics_dtype(z.dtype)
    target = z.gather(1, index).squeeze(1).to(dtype)
    if uses_kernels(z):
        from lightning_lossplug.losses.fused import kernels

        lse, total, _ = kernels.reduce_rows(z, u, None, need_sum, False)
        one = torch.ones_like(lse)
        return lse, target, total, kernels.write_rows(z, index, None, None, None, lse, one, None, None)
    lse, at_label = torch.empty_like(target), torch.empty_like(target)
    total = torch.empty_like(target) if need_sum else None
    for i in range(0, rows, scratch.rows):
        block = slice(i, min(i + scratch.rows, rows))
        first, second = scratch.of(block.stop - i, columns)
        s = _load(z[block], None, first)
        torch.softmax(s, dim=1, out=second)
        lse[block] = s.amax(dim=1) - second.amax(dim=1).log_()
        if total is not None:
            total[block] = s.sum(dim=1) if u is None else s @ u
        at_label[block] = second.gather(1, index[block]).squeeze(1)
        second.view(-1).index_fill_(0, entries(index[block], columns), 0)
        z[block] = second
    return lse, target, total, at_label


def linear_rows(
    z: Tensor, index: Tensor, u: Tensor | None, need_sum: bool, need_sumsq: bool, scratch: Scratch
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Statistics of whole rows for losses whose gradient is linear in the logits; leaves zero at the label.

    Returns:
        Target logit, sum and sum of squares (or None) of each row, [R] each. No exponential is taken.
    """
    target = z.gather(1, index).squeeze(1).to(statistics_dtype(z.dtype))
    if uses_kernels(z):
        from lightning_lossplug.losses.fused import kernels

        _, total, sumsq = kernels.reduce_rows(z, u, None, need_sum, need_sumsq)
    else:
        total = torch.empty_like(target) if need_sum else None
        sumsq = torch.empty_like(target) if need_sumsq else None
        for i in range(0, len(z), scratch.rows):
            block = slice(i, min(i + scratch.rows, len(z)))
            s = _load(z[block], None, scratch.of(block.stop - i, z.shape[1])[0])
            if total is not None:
                total[block] = s.sum(dim=1) if u is None else s @ u
            if sumsq is not None:
                sumsq[block] = torch.linalg.vector_norm(s, dim=1).square_()
    z.view(-1).index_fill_(0, entries(index, z.shape[1]), 0)
    return target, total, sumsq


def write_gradient(
    z: Tensor,
    tile: Tile,
    lse: Tensor,
    tile_lse: Tensor,
    grads: Coefficients,
    scratch: Scratch,
    columns_sum: Tensor | None,
) -> Tensor:
    """Overwrites a tile of raw logits by its gradient, the label's column left at zero.

    Returns:
        What belongs into the label's column, [R]: kept in the statistics' dtype, since it is the largest entry of a row
        and its share of the weight's gradient is a sum of few terms. Zero for rows whose label is elsewhere.
    """
    rows, columns = z.shape
    if uses_kernels(z):
        from lightning_lossplug.losses.fused import kernels

        by = (grads.lse, grads.sum, grads.sumsq)
        at_label = kernels.write_rows(z, tile.column, tile.inside, tile.u, tile.softcap, lse, *by)
        if columns_sum is not None:
            columns_sum.add_(z.sum(dim=0, dtype=columns_sum.dtype))
        return at_label
    at_label = torch.zeros_like(lse)
    # softmax over the tile times exp(tile_lse - lse) is exp(z - lse), by the faster kernel.
    by_softmax = z.device.type == "cpu" and not bool((tile_lse == -torch.inf).any())
    scale = None
    if grads.lse is not None:
        scale = (grads.lse * torch.exp(tile_lse - lse) if by_softmax else grads.lse)[:, None]
    g_sum = None if grads.sum is None else grads.sum[:, None]
    g_square = None if grads.sumsq is None else 2 * grads.sumsq[:, None]
    for i in range(0, rows, scratch.rows):
        block = slice(i, min(i + scratch.rows, rows))
        first, second = scratch.of(block.stop - i, columns)
        s = _load(z[block], tile.softcap, first)
        if scale is None:
            second.zero_()
        elif by_softmax:
            torch.softmax(s, dim=1, out=second).mul_(scale[block])
        else:
            torch.sub(s, lse[block, None], out=second).exp_().mul_(scale[block])
        if g_sum is not None:
            if tile.u is None:
                second.add_(g_sum[block])
            else:
                second.addcmul_(tile.u, g_sum[block])
        if g_square is not None:
            second.addcmul_(s, g_square[block])
        if tile.softcap is not None:
            second.addcmul_(second, s.div_(tile.softcap).square_(), value=-1)
        index = tile.column[block]
        here = second.gather(1, index)
        if tile.inside is None:
            second.view(-1).index_fill_(0, entries(index, columns), 0)
            at_label[block] = here.squeeze(1)
        else:
            inside = tile.inside[block, None]
            second.view(-1).index_copy_(0, entries(index, columns), torch.where(inside, 0, here).squeeze(1))
            at_label[block] = torch.where(inside, here, 0).squeeze(1)
        if columns_sum is not None:
            columns_sum.add_(second.sum(dim=0))
        z[block] = second
    return at_label
