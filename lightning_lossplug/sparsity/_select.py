"""Kernels behind :func:`~lightning_lossplug.sparsity.nm_mask.nm_mask`: plain torch, cache-sized pieces, exact ties."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_VECTOR = 16
_LITTLE_ENDIAN = sys.byteorder == "little"
_UNSPLIT = 32_767


def fill_mask(weight: Tensor, n: int, out: Tensor) -> None:
    groups, m, inner = weight.shape
    bits = weight.view(INTEGER_OF_SIZE[weight.element_size()])
    kernel: type[_ByRank] | type[_ByThreshold] = _ByThreshold
    if inner == 1 and m in (2, 4) and _LITTLE_ENDIAN:
        kernel = _ByRank
    size = _piece_size(weight.device)
    step_i = min(inner, max(1, size // m))
    step_g = min(groups, max(1, size // (m * step_i)))
    worker = None
    for bits_g, out_g in zip(bits.split(step_g), out.split(step_g), strict=True):
        for piece, mask in zip(bits_g.split(step_i, 2), out_g.split(step_i, 2), strict=True):
            if worker is None or worker.shape != piece.shape:
                worker = kernel(piece, n)
            worker(piece, mask)


def _piece_size(device: torch.device) -> int:
    if device.type != "cpu":
        return 1 << 22
    threads = torch.get_num_threads()
    if threads > 1 and (FORCE if FORCE is not None else _busy()):
        return _UNSPLIT
    return min(1 << 21, threads << 19)


FORCE = None


def _busy() -> bool:
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.25 * (os.cpu_count() or 1)


class _ByRank:
    def __init__(self, piece: Tensor, n: int) -> None:
        self.shape = piece.shape
        m, size = piece.shape[1], piece.numel()
        word = {2: torch.int16, 4: torch.int32}[m]

        def new(count, dtype):
            return torch.empty(count, dtype=dtype, device=piece.device)

        def lanes(values: list[int]) -> Tensor:
            total = sum(value << (8 * lane) for lane, value in enumerate(values)) % (1 << 8 * m)
            return torch.tensor(total - (1 << 8 * m) if total >> (8 * m - 1) else total, dtype=word)

        keys = new(size + m, piece.dtype).zero_()
        self._keys, self._beats, self._bytes, self._wins = (
            keys[:size],
            new(size, piece.dtype),
            new(size, torch.uint8),
            new(size // m, word),
        )
        self._pairs = self._bytes.view(word)
        self._magnitude = torch.tensor(torch.iinfo(piece.dtype).max, dtype=piece.dtype)
        self._top = torch.tensor((m - 1).bit_length(), dtype=word)
        bias = (1 << int(self._top)) - (m - n)
        self._start = torch.full_like(self._wins, int(lanes([i + bias for i in range(m)])))
        self._ones = lanes([1] * m)
        self._shifts = [
            (keys[s : s + size], lanes([1] * (m - s)), int(lanes([1] + [0] * (s - 1) + [-1]))) for s in range(1, m)
        ]
        self._word = word

    def __call__(self, piece: Tensor, out: Tensor) -> None:
        torch.bitwise_and(piece.view(-1), self._magnitude, out=self._keys)
        wins = self._start
        for other, counted, sign in self._shifts:
            torch.ge(self._keys, other, out=self._beats)
            self._bytes.copy_(self._beats)
            self._pairs.bitwise_and_(counted)
            wins = torch.add(wins, self._pairs, alpha=sign, out=self._wins)
        wins.bitwise_right_shift_(self._top)
        torch.bitwise_and(wins, self._ones, out=out.view(-1).view(self._word))


class _Order(NamedTuple):
    better: Callable[..., Tensor]
    worse: Callable[..., Tensor]
    best_of: Callable[..., Tensor]
    worst_of: Callable[..., Tensor]
    keeps: Callable[..., Tensor]


_LARGEST = _Order(torch.maximum, torch.minimum, torch.amax, torch.amin, torch.ge)
_SMALLEST = _Order(torch.minimum, torch.maximum, torch.amin, torch.amax, torch.gt)


class _ByThreshold:
    def __init__(self, piece: Tensor, n: int) -> None:
        self.shape, self._n = piece.shape, n
        _, m, inner = piece.shape
        self._order, self._k = (_LARGEST, n) if 2 * n <= m else (_SMALLEST, m - n)
        self._transposed = inner == 1 and m < _VECTOR
        self._magnitude = torch.tensor(torch.iinfo(piece.dtype).max, dtype=piece.dtype)
        shape = piece.permute(2, 1, 0).shape if self._transposed else piece.shape
        self._keys, self._keep = (torch.empty(shape, dtype=piece.dtype, device=piece.device) for _ in range(2))
        self._words = self._transposed and m == 8 and _LITTLE_ENDIAN
        if self._k == 1:
            self._threshold = torch.empty(shape[0], 1, shape[2], dtype=piece.dtype, device=piece.device)
        else:
            self._network = _Network(self._keys, self._k, self._order)
            self._threshold = self._network.result.view(shape[0], 1, shape[2])

    def __call__(self, piece: Tensor, out: Tensor) -> None:
        if self._transposed:
            torch.bitwise_and(piece.permute(2, 1, 0), self._magnitude, out=self._keys)
        else:
            torch.bitwise_and(piece, self._magnitude, out=self._keys)
        if self._k == 1:
            self._order.best_of(self._keys, 1, True, out=self._threshold)
        else:
            self._network()
        self._order.keeps(self._keys, self._threshold, out=self._keep)
        _settle_ties(self._keys, self._threshold, self._n, self._keep)
        if self._words:
            _write_words(self._keep[0], out)
        else:
            out.view(torch.uint8).copy_(self._keep.permute(2, 1, 0) if self._transposed else self._keep)


class _Network:
    def __init__(self, keys: Tensor, k: int, order: _Order) -> None:
        groups, m, inner = keys.shape
        length = 1 << (k - 1).bit_length()
        rows = length
        while rows < m:
            rows *= 2
        spare = [torch.empty(rows, groups * inner, dtype=keys.dtype, device=keys.device) for _ in range(2)]
        self.steps = []
        self._nothing = torch.tensor(-1, dtype=keys.dtype)
        turn = 0
        if groups == 1 and rows == m:
            table = keys[0]
        else:
            spare[1][m:] = -1 if order is _LARGEST else torch.iinfo(keys.dtype).max
            self.steps.append(
                (torch.bitwise_and, keys.movedim(1, 0), self._nothing, spare[1][:m].view(m, groups, inner))
            )
            table = spare[1]

        def merge(table: Tensor, run: int) -> Tensor:
            nonlocal turn
            distance = run // 2
            while distance:
                result = spare[turn][: len(table)]
                turn = 1 - turn
                shape = (-1, min(2, len(table) // run), run // (2 * distance), 2, distance, table.shape[1])
                source, target = table.view(shape), result.view(shape)
                for odd in range(shape[1]):
                    left, right = source[:, odd, :, 0], source[:, odd, :, 1]
                    self.steps.append((order.better, left, right, target[:, odd, :, odd]))
                    self.steps.append((order.worse, left, right, target[:, odd, :, 1 - odd]))
                table, distance = result, distance // 2
            return table

        run = 2
        while run <= length:
            table, run = merge(table, run), 2 * run
        while len(table) > length:
            half = len(table) // 2
            pairs = table.view(-1, 2, length, table.shape[1])
            result = spare[turn][:half]
            turn = 1 - turn
            self.steps.append((order.better, pairs[:, 0], pairs[:, 1], result.view(-1, length, table.shape[1])))
            table = result
            if half > length or k < length:
                table = merge(table, length)
        if k == length:
            half = length // 2
            while half:
                result = spare[turn][:half]
                turn = 1 - turn
                self.steps.append((order.worse, table[:half], table[half:], result))
                table, half = result, half // 2
            self.result = table[0]
        else:
            self.result = table[k - 1]

    def __call__(self) -> None:
        for compare, left, right, out in self.steps:
            compare(left, right, out=out)


def _settle_ties(keys: Tensor, threshold: Tensor, n: int, keep: Tensor) -> None:
    def exact(keys: Tensor, threshold: Tensor) -> Tensor:
        above, equal = keys > threshold, keys == threshold
        missing = n - above.sum(1, keepdim=True, dtype=torch.int32)
        return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))

    if keys.device.type != "cpu":
        keep.copy_(exact(keys, threshold))
        return
    if int(keep.sum(dtype=torch.int32)) == n * threshold.numel():
        return
    uneven = keep.sum(1) != n
    settled = exact(keys.movedim(1, 2)[uneven], threshold.movedim(1, 2)[uneven])
    keep.movedim(1, 2)[uneven] = settled.to(keep.dtype)


def _write_words(keep: Tensor, out: Tensor) -> None:
    size = keep.element_size()
    parts = keep.view(8 // size, size, -1)
    packed = _horner([parts[:, i] for i in range(size)], 1 << 8).to(torch.int64)
    out.view(-1).view(torch.int64).copy_(_horner(list(packed), 1 << (8 * size)))


def _horner(digits: list[Tensor], base: int) -> Tensor:
    value = digits[-1]
    for digit in reversed(digits[:-1]):
        value = torch.add(digit, value, alpha=base)
    return value
