"""Compressors that send some coordinates: all, the largest, the largest of each block, random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.communication.base import Compressor, Draw, Message
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


def topk_indices(v: Tensor, k: int) -> Tensor:
    """Returns the flat positions of the k entries of largest magnitude in increasing order, ties to the lowest.

    ``torch.topk`` promises nothing about ties.
    """
    size = v.flatten().abs()
    least = size.topk(k, sorted=True).values[-1]
    above, tied = size > least, size == least
    keep = above | (tied & (tied.cumsum(0) <= k - above.sum()))
    return keep.nonzero().flatten()


def topk(v: Tensor, k: int) -> Tensor:
    """Keeps the k entries of largest magnitude (ties: the lowest positions), the others are zero."""
    return _scatter(v, topk_indices(v, k))


def block_topk_indices(v: Tensor, block_size: int) -> Tensor:
    """Returns the flat position of the largest entry of every block of consecutive entries; the last may be short."""
    blocks = torch.nn.functional.pad(v.flatten().abs(), (0, -v.numel() % block_size), value=-1.0)
    blocks = blocks.reshape(-1, block_size)
    places = torch.arange(block_size, device=v.device)
    first = torch.where(blocks == blocks.amax(1, keepdim=True), places, block_size).amin(1)
    return first + torch.arange(len(blocks), device=v.device) * block_size


def block_topk(v: Tensor, block_size: int) -> Tensor:
    """Keeps the largest entry of each block of ``block_size`` consecutive entries, without a global sort."""
    return _scatter(v, block_topk_indices(v, block_size))


def randk(v: Tensor, k: int, generator: torch.Generator, unbiased: bool = False) -> Tensor:
    """Keeps k entries drawn without replacement; unbiased: times numel/k."""
    kept = _scatter(v, _random_indices(v, k, generator))
    return kept * (v.numel() / k) if unbiased else kept


def _random_indices(v: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(v.numel(), generator=generator, device=v.device)[:k]


def _scatter(v: Tensor, indices: Tensor) -> Tensor:
    flat = v.flatten()
    return torch.zeros_like(flat).index_put_((indices,), flat[indices]).reshape(v.shape)


def kept(numel: int, ratio: float) -> int:
    """Returns how many of ``numel`` coordinates a ratio keeps: rounded, at least one."""
    return max(1, round(ratio * numel))


@register("compressor", "identity", family="dense")
class Identity(Compressor):
    """Sends everything: the rules of error feedback without compression."""

    name: ClassVar[str] = "identity"
    reducible: ClassVar[bool] = True

    def encode(self, v: Tensor, draw: Draw) -> Message:
        """The tensor."""
        return (v.flatten(),)

    def decode(self, message: Message, like: Tensor, draw: Draw) -> Tensor:
        """The tensor."""
        return message[0].reshape(like.shape)

    def message_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """All of it."""
        return math.prod(shape) * itemsize

    def omega(self, numel: int) -> float:
        """0."""
        return 0.0

    def contraction(self, numel: int) -> float:
        """1."""
        return 1.0


@register("compressor", "topk", family="sparse", paper="Sparsified SGD with Memory", arxiv="1809.07599")
class TopK(Compressor):
    """Sends the entries of largest magnitude with their positions; see :func:`topk`. Contractive, a = k/d.

    Args:
        ratio: Share of the entries, in (0, 1]; at least one of each tensor. An entry takes 8 bytes instead of 4.

    Raises:
        LossplugError: ``ratio`` out of range.
    """

    name: ClassVar[str] = "topk"

    def __init__(self, ratio: float = 0.01) -> None:
        self.ratio = check_number(self.name, "ratio", ratio, above=0, most=1)

    def encode(self, v: Tensor, draw: Draw) -> Message:
        """Values, and positions as int32."""
        indices = topk_indices(v, kept(v.numel(), self.ratio))
        return v.flatten()[indices], indices.to(torch.int32)

    def decode(self, message: Message, like: Tensor, draw: Draw) -> Tensor:
        """Values at their positions."""
        return _place(message[0], message[1].long(), like)

    def message_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """A value and 4 bytes per entry."""
        return kept(math.prod(shape), self.ratio) * (itemsize + 4)

    def contraction(self, numel: int) -> float:
        """k/d."""
        return kept(numel, self.ratio) / numel


@register("compressor", "block_topk", family="sparse")
class BlockTopK(Compressor):
    """Sends the largest entry of each block; see :func:`block_topk`. Contractive, a = 1/block_size.

    Args:
        block_size: Consecutive entries per block, >= 1. Up to 256 an entry takes 5 bytes.

    Raises:
        LossplugError: ``block_size`` out of range.
    """

    name: ClassVar[str] = "block_topk"

    def __init__(self, block_size: int = 128) -> None:
        self.block_size = int(check_number(self.name, "block_size", block_size, least=1))
        self.dtype = torch.uint8 if block_size <= 2**8 else torch.int16 if block_size <= 2**15 else torch.int32

    def encode(self, v: Tensor, draw: Draw) -> Message:
        """Values, and places within the blocks in the smallest integer type."""
        indices = block_topk_indices(v, self.block_size)
        return v.flatten()[indices], (indices % self.block_size).to(self.dtype)

    def decode(self, message: Message, like: Tensor, draw: Draw) -> Tensor:
        """Values at their places."""
        values, places = message
        starts = torch.arange(len(values), device=like.device) * self.block_size
        return _place(values, starts + places.long(), like)

    def message_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """A value and a place per block."""
        return -(-math.prod(shape) // self.block_size) * (itemsize + self.dtype.itemsize)

    def contraction(self, numel: int) -> float:
        """1/block_size."""
        return 1 / min(self.block_size, numel)


@register("compressor", "randk", family="sparse", paper="Sparsified SGD with Memory", arxiv="1809.07599")
class RandK(Compressor):
    """Sends random entries, the same on all ranks by a shared seed; see :func:`randk`. No positions travel.

    Contractive with a = k/d as it is; unbiased (times d/k) with omega = d/k - 1.

    Args:
        ratio: Share of the entries, in (0, 1]; at least one of each tensor.
        unbiased: Scale by d/k.

    Raises:
        LossplugError: ``ratio`` out of range.
    """

    name: ClassVar[str] = "randk"
    reducible: ClassVar[bool] = True

    def __init__(self, ratio: float = 0.01, unbiased: bool = False) -> None:
        self.ratio = check_number(self.name, "ratio", ratio, above=0, most=1)
        self.unbiased = unbiased

    def encode(self, v: Tensor, draw: Draw) -> Message:
        """Values."""
        return (v.flatten()[_random_indices(v, kept(v.numel(), self.ratio), draw.shared(v.device))],)

    def decode(self, message: Message, like: Tensor, draw: Draw) -> Tensor:
        """Values at the positions drawn again from the seed."""
        k = kept(like.numel(), self.ratio)
        values = message[0] * (like.numel() / k) if self.unbiased else message[0]
        return _place(values, _random_indices(like, k, draw.shared(like.device)), like)

    def message_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """A value per entry."""
        return kept(math.prod(shape), self.ratio) * itemsize

    def omega(self, numel: int) -> float:
        """d/k - 1."""
        return numel / kept(numel, self.ratio) - 1

    def contraction(self, numel: int) -> float:
        """k/d."""
        return kept(numel, self.ratio) / numel


def _place(values: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    flat = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
    return flat.index_put_((indices,), values.to(like.dtype)).reshape(like.shape)
