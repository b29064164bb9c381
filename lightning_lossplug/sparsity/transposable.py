"""Masks that are N:M along both axes, so that the products with W and with its transpose are sparse alike.

A weight is cut into M x M tiles; in each, every row and every column keeps N entries, of the largest total magnitude.
Exact for every M: over all valid patterns of a tile for M <= 4, by minimum-cost flow on all tiles at once above.
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.nm_mask import require_pattern

Solver = Literal["exact", "greedy", "exhaustive24"]
SOLVERS = ("exact", "greedy", "exhaustive24")

_TILES = 1 << 14  # tiles solved together: what the intermediate products of a piece may hold


@register(
    "mask",
    "transposable_mask",
    family="nm_sparsity",
    paper="Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks",
    arxiv="2102.08124",
)
def transposable_mask(
    weight: Tensor,
    n: int = 2,
    m: int = 4,
    solver: Solver = "exact",
    axes: tuple[int, int] = (0, 1),
    scores: Tensor | None = None,
) -> Tensor:
    """Returns a mask with N of every M entries along both axes.

    Args:
        weight: Floating-point tensor with at least two axes; tiles lie in two of them, at each place of the rest.
        n: Entries kept per row and per column of a tile.
        m: Edge of a tile; it divides both axes.
        solver: ``exact`` maximises the kept magnitude (all patterns for M <= 4, otherwise a flow that takes N M rounds;
            magnitudes are compared as 40-bit integers of the tile's largest; on a CPU that is seconds per million
            weights). ``greedy`` takes entries in descending order while their row and column have room: at least half
            of the best and mostly about 98.5 % of it, and some rows and columns may keep fewer than N. ``exhaustive24``
            is the exact search for 2:4 alone.
        axes: Output and reduction axis, in either order.
        scores: Replaces ``|weight|``: non-negative, of the same shape.

    Raises:
        LossplugError: A pattern that doesn't fit, an unknown solver, or values that aren't finite.
    """
    require_pattern(n, m)
    if solver not in SOLVERS:
        raise LossplugError(f"solver is {solver!r}", where="nm_transposable", remedy=f"Use one of {', '.join(SOLVERS)}")
    if solver == "exhaustive24" and (n, m) != (2, 4):
        raise LossplugError(f"exhaustive24 can't search {n}:{m}", where="nm_transposable", remedy="Use solver='exact'")
    if weight.ndim < 2 or axes[0] % weight.ndim == axes[1] % weight.ndim:
        raise LossplugError(f"a weight of shape {tuple(weight.shape)} has no axes {axes}", where="nm_transposable")
    size = (weight.detach() if scores is None else scores.detach()).abs().movedim(axes, (-2, -1))
    rows, columns = size.shape[-2:]
    if rows % m or columns % m:
        raise LossplugError(
            f"tiles of {m} x {m} don't divide the axes {axes} of a weight of shape {tuple(weight.shape)}",
            where="nm_transposable",
            remedy="Choose an M that divides both axes, or leave this weight dense",
        )
    if not bool(size.isfinite().all()):
        raise LossplugError(
            "NaN or infinite entries", where="nm_transposable", remedy="Look for the step they came from"
        )
    shape = (*size.shape[:-2], rows // m, m, columns // m, m)
    tiles = size.reshape(shape).transpose(-3, -2)
    mask = torch.cat([_solve(piece, n, m, solver) for piece in tiles.reshape(-1, m, m).split(_TILES)])
    mask = mask.view(tiles.shape).transpose(-3, -2).reshape(size.shape)
    return mask.movedim((-2, -1), axes).contiguous()


def _solve(tiles: Tensor, n: int, m: int, solver: Solver) -> Tensor:
    if n == m:
        return torch.ones_like(tiles, dtype=torch.bool)
    if solver == "greedy":
        return _greedy(tiles, n)
    return _exhaustive(tiles, n) if m <= 4 else _flow(tiles, n)


@functools.cache
def tile_patterns(n: int, m: int) -> Tensor:
    """Returns every 0/1 matrix ``[P, m, m]`` with ``n`` ones in each row and column: 90 of them for 2:4."""
    rows = [torch.zeros(m).index_fill_(0, torch.tensor(choice), 1.0) for choice in itertools.combinations(range(m), n)]
    tiles = (torch.stack(choice) for choice in itertools.product(rows, repeat=m))
    return torch.stack([tile for tile in tiles if bool((tile.sum(0) == n).all())])


def _exhaustive(tiles: Tensor, n: int) -> Tensor:
    m = tiles.shape[-1]
    patterns = tile_patterns(n, m).to(tiles.device)
    wide = tiles.dtype if tiles.dtype == torch.float64 else torch.float32
    mass = tiles.reshape(-1, m * m).to(wide) @ patterns.reshape(-1, m * m).to(wide).t()
    return patterns[mass.argmax(1)].bool()


def _greedy(tiles: Tensor, n: int) -> Tensor:
    count, m = len(tiles), tiles.shape[-1]
    order = tiles.reshape(count, -1).argsort(dim=1, descending=True, stable=True)
    every = torch.arange(count, device=tiles.device)
    rows = torch.zeros(count, m, dtype=torch.int32, device=tiles.device)
    columns = torch.zeros_like(rows)
    kept = torch.zeros(count, m * m, dtype=torch.bool, device=tiles.device)
    for place in order.t():
        i, j = place // m, place % m
        room = (rows[every, i] < n) & (columns[every, j] < n)
        kept[every, place] = room
        rows[every, i] += room.int()
        columns[every, j] += room.int()
    return kept.view(count, m, m)


def _flow(tiles: Tensor, n: int) -> Tensor:
    """Minimum-cost flow by successive shortest paths, one unit per round in every tile at once.

    A path leads from a row with room to a column with room, over entries that it takes (cost ``-|w|``) and entries that
    it gives up (``+|w|``). Distances come from Bellman-Ford; integer costs keep rounding from making a false cycle.
    """
    count, m = len(tiles), tiles.shape[-1]
    largest = tiles.amax((1, 2), keepdim=True).double()
    gain = (tiles.double() / torch.where(largest > 0, largest, 1) * 2**40).round().long()
    kept = torch.zeros(count, m, m, dtype=torch.bool, device=tiles.device)
    every = torch.arange(count, device=tiles.device)
    far = 1 << 60
    for _ in range(n * m):
        row = torch.where(kept.sum(2) < n, 0, far)
        column = torch.full_like(row, far)
        row_parent = torch.full_like(row, -1)  # the column that gives up an entry of the row; -1 at the start of a path
        column_parent = torch.full_like(row, -1)
        taken = torch.where(kept, far, -gain)
        given = torch.where(kept, gain, far)
        for _ in range(m):
            best, parent = (row[:, :, None] + taken).min(1)
            better = best < column
            column = torch.where(better, best, column)
            column_parent = torch.where(better, parent, column_parent)
            best, parent = (column[:, None, :] + given).min(2)
            better = best < row
            row = torch.where(better, best, row)
            row_parent = torch.where(better, parent, row_parent)
            if not bool(better.any()):
                break
        end = torch.where(kept.sum(1) < n, column, far).argmin(1)
        going = torch.ones(count, dtype=torch.bool, device=tiles.device)
        for _ in range(m):
            start = column_parent[every, end]
            kept[every, start, end] |= going
            before = row_parent[every, start]
            going = going & (before >= 0)
            if not bool(going.any()):
                break
            end = torch.where(going, before, end)
            kept[every, start, end] &= ~going
    return kept


def mvue24(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns an unbiased 2:4 sparse estimate of a tensor, along its last axis.

    Two of every four entries are drawn without replacement with probabilities proportional to ``|x|`` and divided by
    the probability that they are drawn, ``pi_i = p_i + sum_{j != i} p_j p_i / (1 - p_j)``. Used on the output gradient,
    it makes the product for the weight gradient sparse as well (arXiv 2404.01847); without kernels that use it, it only
    adds noise, so no recipe does.

    Args:
        values: ``[..., 4 k]``. A group with at most two entries that aren't zero is returned as it is.
        generator: Source of randomness.

    Raises:
        LossplugError: The last axis isn't a multiple of four.
    """
    if not values.ndim or values.shape[-1] % 4:
        raise LossplugError(f"the last axis of shape {tuple(values.shape)} is no multiple of 4", where="mvue24")
    groups = values.reshape(-1, 4)
    size = groups.abs().to(torch.promote_types(values.dtype, torch.float32))
    p = size / size.sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    odds = p / (1 - p)
    # p_i / (1 - p_i) is infinite where one entry is alone; such groups are sparse already.
    sparse = (size > 0).sum(1, keepdim=True) <= 2
    odds = torch.where(sparse, 0, odds)
    probability = p * (1 + odds.sum(1, keepdim=True) - odds)
    # Gumbel's trick: the two largest of log p + noise are a draw without replacement.
    noise = torch.empty_like(p).exponential_(generator=generator)
    keys = torch.where(size > 0, p / noise, -1.0)
    drawn = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, keys.topk(2, dim=1).indices, True)
    scaled = groups / torch.where(probability > 0, probability, 1).to(groups.dtype)
    chosen = torch.where(drawn & (size > 0), scaled, torch.zeros_like(groups))
    return torch.where(sparse, groups, chosen).view(values.shape)
