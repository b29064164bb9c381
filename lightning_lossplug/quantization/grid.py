"""What all quantisers share: integer ranges, where scales live, the checks of their arguments."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lossplug.errors import LossplugError, suggestion

Role = Literal["weight", "activation"]
GradScale = Literal["paper", "numel", "none"]

EPS = 1e-8  # floor of every scale where it is used; a scale at or below it is reported as clamped


def check_range(where: str, name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises :class:`LossplugError` unless ``value`` is a number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise LossplugError(f"{name} is {value!r}, allowed is [{low}, {high}]", where=where)


def check_bits(where: str, bits: float, low: int, high: int, remedy: str | None = None) -> int:
    """Returns ``bits``, or raises unless it is a whole number in [low, high]."""
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not low <= bits <= high or int(bits) != bits:
        raise LossplugError(f"bits is {bits!r}, allowed is {low} to {high}", where=where, remedy=remedy)
    return int(bits)


def check_choice(where: str, name: str, value: object, choices: Collection[str]) -> None:
    """Raises :class:`LossplugError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise LossplugError(f"{name} is {value!r}", where=where, remedy=suggestion(str(value), choices))


def check_finite(where: str, x: Tensor, what: str) -> None:
    """Raises :class:`LossplugError` for NaN or infinite entries."""
    if x.numel() == 0:
        raise LossplugError(f"the {what} is empty", where=where)
    low, high = x.detach().aminmax()  # NaN goes through both, so this is one pass
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = x.numel() - int(torch.isfinite(x).sum())
        raise LossplugError(
            f"{bad} of {x.numel()} entries of the {what} are NaN or infinite, so they have no scale",
            where=where,
            remedy="Look at the data and the weights before quantising",
        )


def upcast(x: Tensor) -> Tensor:
    """Returns half-precision tensors as float32: in bfloat16 the rounding itself would change codes."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def integer_range(bits: int, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Returns ``(Qn, Qp)``: two's complement, symmetric when ``narrow``, or from 0 when unsigned."""
    if not signed:
        return 0, 2**bits - 1
    top = 2 ** (bits - 1) - 1
    return -top if narrow else -top - 1, top


def grad_factor(x: Tensor, top: float, grad_scale: str) -> float:
    """Returns LSQ's ``1/sqrt(N Qp)``: ``numel`` counts all of ``x``, ``paper`` one sample of it, ``none`` is 1."""
    if grad_scale == "none":
        return 1.0
    n = x.numel() // max(x.shape[0], 1) if grad_scale == "paper" and x.ndim else x.numel()
    return 1.0 / math.sqrt(max(n, 1) * top)


def sum_like(x: Tensor, scale: Tensor) -> Tensor:
    """Sums ``x`` over everything a scale is shared by; the result has the shape of ``scale``."""
    return x.sum().reshape(scale.shape) if scale.numel() == 1 else x.sum_to_size(scale.shape)


@dataclass(frozen=True)
class Layout:
    """Where the scales of a tensor live: one for all, one per channel, or one per group along the rest of a channel.

    Args:
        per_channel: One scale for each index of ``axis``.
        group_size: One scale for this many consecutive entries of a channel, instead.
        axis: Axis of the channels.
    """

    per_channel: bool = False
    group_size: int | None = None
    axis: int = 0

    def check(self, shape: Sequence[int], where: str) -> None:
        """Raises :class:`LossplugError` when a tensor of this shape can't be laid out so."""
        if (self.per_channel or self.group_size) and not shape:
            raise LossplugError("a tensor without axes has no channels", where=where)
        if self.group_size:
            row = math.prod(shape) // shape[self.axis]
            if self.group_size < 1 or row % self.group_size:
                raise LossplugError(
                    f"group_size {self.group_size} does not divide the {row} weights of a channel (shape "
                    f"{tuple(shape)})",
                    where=where,
                    remedy="Choose another group_size, or exclude the layer",
                )

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the scales of a tensor, which broadcasts against :meth:`arrange`."""
        if self.group_size:
            rows = shape[self.axis]
            return rows, math.prod(shape) // rows // self.group_size, 1
        if self.per_channel:
            axis = self.axis % len(shape)
            return tuple(size if i == axis else 1 for i, size in enumerate(shape))
        return (1,)

    def arrange(self, x: Tensor) -> Tensor:
        """Returns the tensor in the form the scales broadcast against: itself, or [channels, groups, group_size]."""
        if not self.group_size:
            return x
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1, self.group_size)

    def restore(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """Undoes :meth:`arrange`."""
        if not self.group_size:
            return y
        rest = [size for i, size in enumerate(shape) if i != self.axis % len(shape)]
        return y.reshape(shape[self.axis], *rest).movedim(0, self.axis)

    def dims(self, ndim: int) -> list[int]:
        """Returns the axes of an arranged tensor that share a scale."""
        if self.group_size:
            return [2]
        if self.per_channel:
            return [i for i in range(ndim) if i != self.axis % ndim]
        return list(range(ndim))


def mean_over_ranks(x: Tensor) -> Tensor:
    """Returns the mean over all processes, so that data of each rank gives every rank the same scale."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def largest_over_ranks(x: Tensor) -> Tensor:
    """Returns the elementwise maximum over all processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x
