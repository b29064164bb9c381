"""The kernel of :func:`~lightning_lossplug.sparsity.nm_mask.nm_mask`: plain torch, cache-sized pieces, exact ties.

The weight arrives as a contiguous ``[G, m, I]`` tensor: groups, places in a group, and what lies inside the group axis
in memory. Magnitudes are compared as integers: without the sign bit, IEEE numbers of one width have the order of their
bits, so every dtype runs at the speed of its width and ``-0.0`` equals ``0.0``.

A piece of the weight is worked on by one of three ways (``tests/benchmarks/bench_nm_mask.py`` measures them):

* groups of 2 or 4, contiguous: for each entry, count the entries of its group that it beats, by shifted comparisons
  of the flat array; the counts of a group are the bytes of one word. Nothing is moved and ties come out right.
* one entry kept, or one dropped: the maximum or minimum of the group is the threshold.
* otherwise: a bitonic selection network over the rows of the transposed piece finds the threshold.

On a GPU with Triton, groups of up to 64 are the work of one kernel (:mod:`~lightning_lossplug.sparsity.kernels`).
All views and operations of a piece are set up once and replayed: Python costs as much as the arithmetic on a piece
that fits the cache.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# The Triton kernel compares every entry of a group with every other: beyond this the network has less to do.
LARGEST_GROUP = 64

# Fewer entries than this don't fill a vector register: a transposed copy beats reducing or broadcasting along a group.
_VECTOR = 16
# torch shares an operation among its threads from 32768 entries on.
_UNSPLIT = 32_767
_WORDS = sys.byteorder == "little"


def fill_mask(weight: Tensor, n: int, out: Tensor) -> None:
    """Writes the N:M mask of ``weight`` into ``out``.

    Args:
        weight: Contiguous ``[G, m, I]``, floating point, not empty.
        n: Entries kept per group, ``0 < n < m``.
        out: Contiguous bool tensor of the same shape.
    """
    groups, m, inner = weight.shape
    if uses_kernel(weight, m):
        from lightning_lossplug.sparsity import kernels

        kernels.fill(weight, n, out)
        return
    bits = weight.view(INTEGER_OF_SIZE[weight.element_size()])
    size = _piece_size(weight.device)
    if _WORDS and inner == 1 and m in _ByRank.word:
        size = max(m, size // m * m)
        by_rank = None
        for piece, mask in zip(bits.view(-1).split(size), out.view(-1).view(torch.uint8).split(size), strict=True):
            if by_rank is None or by_rank.size != len(piece):
                by_rank = _ByRank(piece, n, m)
            by_rank(piece, mask)
        return
    step_i = min(inner, max(1, size // m))
    step_g = min(groups, max(1, size // (m * step_i)))
    by_threshold = None
    for strip, strip_mask in zip(bits.split(step_g), out.split(step_g), strict=True):
        for piece, mask in zip(strip.split(step_i, 2), strip_mask.split(step_i, 2), strict=True):
            if by_threshold is None or by_threshold.shape != piece.shape:
                by_threshold = _ByThreshold(piece, n)
            by_threshold(piece, mask)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_kernel(weight: Tensor, m: int) -> bool:
    """Whether groups of m entries of this weight are the work of the Triton kernel."""
    return weight.is_cuda and m <= LARGEST_GROUP and m & (m - 1) == 0 and _has_triton()


def _piece_size(device: torch.device) -> int:
    """Entries per operation: about what the caches of the threads hold, or enough to fill an accelerator.

    When other work keeps the cores busy, each shared operation waits for a thread that isn't scheduled; then the
    pieces are so small that every operation stays on the calling thread.
    """
    if device.type != "cpu":
        return 1 << 22
    threads = torch.get_num_threads()
    if threads > 1 and hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.25 * (os.cpu_count() or 1):
        return _UNSPLIT
    return min(threads << 18, 1 << 21)


def _scalar(value: int, dtype: torch.dtype) -> Tensor:
    """A ready-made 0-dim operand: torch would build one at each call."""
    return torch.tensor(value, dtype=dtype)


class _ByRank:
    """Counts, for each entry, how many of its group it beats; keeps those that beat ``m - n`` or more."""

    word = {2: torch.int16, 4: torch.int32}

    def __init__(self, piece: Tensor, n: int, m: int) -> None:
        self.size, word = len(piece), self.word[m]
        keys = piece.new_zeros(self.size + m)  # what follows the last group is compared but not counted
        beats, beat_bytes = piece.new_empty(self.size), piece.new_empty(self.size, dtype=torch.uint8)
        pairs = beat_bytes.view(word)
        # Entry i is the later one in i pairs and starts with as many wins; each is taken back if the earlier one is
        # at least as large.
        start = torch.full_like(pairs, _lanes(range(m), word))
        wins = torch.empty_like(pairs)
        self._keys = keys[: self.size]
        self._steps: list[Callable[[], Any]] = []
        for shift in range(1, m):
            counted = _scalar(_lanes([1] * (m - shift), word), word)
            sign = _lanes([1] + [0] * (shift - 1) + [-1], word)
            self._steps += [
                # Comparing into the same dtype, then narrowing, is vectorised; comparing into bool is not.
                partial(torch.ge, self._keys, keys[shift : shift + self.size], out=beats),
                partial(beat_bytes.copy_, beats),
                partial(pairs.bitwise_and_, counted),
                partial(torch.add, start if shift == 1 else wins, pairs, alpha=sign, out=wins),
            ]
        self._magnitude = _scalar(torch.iinfo(piece.dtype).max, piece.dtype)
        self._finish = partial(torch.ge, wins.view(torch.uint8), _scalar(m - n, torch.uint8))

    def __call__(self, piece: Tensor, mask: Tensor) -> None:
        torch.bitwise_and(piece, self._magnitude, out=self._keys)
        for step in self._steps:
            step()
        self._finish(out=mask)


def _lanes(values: Iterable[int], word: torch.dtype) -> int:
    """The signed word with these numbers in its bytes, borrowing from the next byte for a negative one."""
    bits = torch.iinfo(word).bits
    total = sum(value << (8 * lane) for lane, value in enumerate(values)) % (1 << bits)
    return total - (1 << bits) if total >> (bits - 1) else total


class _Order(NamedTuple):
    better: Callable[..., Tensor]
    worse: Callable[..., Tensor]
    best_of: Callable[..., Tensor]
    keeps: Callable[..., Tensor]


_LARGEST = _Order(torch.maximum, torch.minimum, torch.amax, torch.ge)
_SMALLEST = _Order(torch.minimum, torch.maximum, torch.amin, torch.gt)


class _ByThreshold:
    def __init__(self, piece: Tensor, n: int) -> None:
        self.shape, self._n = piece.shape, n
        _, m, inner = piece.shape
        self._transposed = inner == 1 and m < _VECTOR
        layout = piece.shape if not self._transposed else (1, m, piece.shape[0])
        self._keys, self._keep = piece.new_empty(layout), piece.new_empty(layout)
        # Keeping n of m is dropping m - n: look for the shorter list.
        order, k = (_LARGEST, n) if 2 * n <= m else (_SMALLEST, m - n)
        if k == 1:
            threshold = piece.new_empty(layout[0], 1, layout[2])
            steps: list[Callable[[], Any]] = [partial(order.best_of, self._keys, 1, True, out=threshold)]
        else:
            steps, kth = _network(self._keys, k, order)
            threshold = kth.view(layout[0], 1, layout[2])
        self._steps: list[Callable[[], Any]] = [*steps, partial(order.keeps, self._keys, threshold, out=self._keep)]
        self._threshold = threshold
        self._magnitude = _scalar(torch.iinfo(piece.dtype).max, piece.dtype)

    def __call__(self, piece: Tensor, out: Tensor) -> None:
        if self._transposed:
            piece, out = piece.permute(2, 1, 0), out.permute(2, 1, 0)
        torch.bitwise_and(piece, self._magnitude, out=self._keys)
        for step in self._steps:
            step()
        _settle_ties(self._keys, self._threshold, self._n, self._keep)
        if _WORDS and self._transposed and piece.shape[1] == 8:
            _write_words(self._keep[0], out[0].t())
        else:
            out.view(torch.uint8).copy_(self._keep)


def _network(keys: Tensor, k: int, order: _Order) -> tuple[list[Callable[[], Any]], Tensor]:
    """Sets up the search for the k-th best of each group, by Batcher's bitonic network.

    Runs of ``2^r >= k`` rows are sorted, then pairs of runs are merged into their better half until one run is left.

    Returns:
        The steps, and the row they leave the result in.
    """
    groups, m, inner = keys.shape
    steps: list[Callable[[], Any]] = []
    length = 1 << (k - 1).bit_length()
    rows = length
    while rows < m:
        rows *= 2
    arrays = [keys.new_empty(rows, groups * inner) for _ in range(2)]

    def result(count: int) -> Tensor:
        arrays.reverse()
        return arrays[0][:count]

    def merge(table: Tensor, run: int) -> Tensor:
        """Sorts bitonic runs: the best comes first in even runs and last in odd ones."""
        distance = run // 2
        while distance:
            target = result(len(table))
            shape = (-1, min(2, len(table) // run), run // (2 * distance), 2, distance, table.shape[1])
            source, sorted_ = table.view(shape), target.view(shape)
            for odd in range(shape[1]):
                pair = source[:, odd, :, 0], source[:, odd, :, 1]
                steps.append(partial(order.better, *pair, out=sorted_[:, odd, :, odd]))
                steps.append(partial(order.worse, *pair, out=sorted_[:, odd, :, 1 - odd]))
            table, distance = target, distance // 2
        return table

    if groups == 1 and rows == m:
        table = keys[0]
    else:
        table = result(rows)
        table[m:] = -1 if order is _LARGEST else torch.iinfo(keys.dtype).max  # never selected
        # An `and` that changes nothing, since copy_ transposes on one thread.
        target = table[:m].view(m, groups, inner)
        steps.append(partial(torch.bitwise_and, keys.movedim(1, 0), _scalar(-1, keys.dtype), out=target))
    run = 2
    while run <= length:
        table, run = merge(table, run), 2 * run
    while len(table) > length:
        pairs = table.view(-1, 2, length, table.shape[1])
        table = result(len(table) // 2)
        steps.append(partial(order.better, pairs[:, 0], pairs[:, 1], out=table.view(-1, length, table.shape[1])))
        if len(table) > length or k < length:
            table = merge(table, length)
    while k == length and len(table) > 1:
        left, right = table.chunk(2)
        table = result(len(left))
        steps.append(partial(order.worse, left, right, out=table))
    return steps, table[k - 1 if k < length else 0]


def _settle_ties(keys: Tensor, threshold: Tensor, n: int, keep: Tensor) -> None:
    """Makes ``keep`` hold exactly n entries per group; of those equal to the threshold, the first ones."""

    def exact(keys: Tensor, threshold: Tensor) -> Tensor:
        above, equal = keys > threshold, keys == threshold
        missing = n - above.sum(1, keepdim=True, dtype=torch.int32)
        return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))

    if keys.device.type != "cpu":  # to ask whether there are ties would wait for the device
        keep.copy_(exact(keys, threshold))
    elif int(keep.sum(dtype=torch.int32)) != n * threshold.numel():
        uneven = keep.sum(1, dtype=torch.int32) != n
        settled = exact(keys.movedim(1, 2)[uneven], threshold.movedim(1, 2)[uneven])
        keep.movedim(1, 2)[uneven] = settled.to(keep.dtype)


def _write_words(keep: Tensor, out: Tensor) -> None:
    """Writes eight rows of 0 and 1 as the eight bytes of contiguous words."""
    size = keep.element_size()
    parts = keep.view(8 // size, size, -1)
    packed = _horner([parts[:, i] for i in range(size)], 1 << 8).to(torch.int64)
    out.view(torch.int64).copy_(_horner(list(packed), 1 << (8 * size)).unsqueeze(1))


def _horner(digits: list[Tensor], base: int) -> Tensor:
    value = digits[-1]
    for digit in reversed(digits[:-1]):
        value = torch.add(digit, value, alpha=base)
    return value
