"""What every loss does before its arithmetic: number ranges, dtypes, the upcast of half precision, sample weights."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.losses.reduction import reduce_rows


def check_number(
    where: str,
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """Returns ``value``, or raises unless it is finite and ``least <= value <= most``, ``above < value < below``.

    Raises:
        LossplugError: With the value and the allowed interval.
    """
    low = least if least is not None else above
    high = most if most is not None else below
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = (
        number
        and float("-inf") < value < float("inf")
        and (low is None or (value >= low if least is not None else value > low))
        and (high is None or (value <= high if most is not None else value < high))
    )
    if not inside:
        left = "(-inf" if low is None else f"[{low}" if least is not None else f"({low}"
        right = "inf)" if high is None else f"{high}]" if most is not None else f"{high})"
        raise LossplugError(f"{name} is {value!r}, allowed is {left}, {right}", where=where)
    return value


def check_choice(where: str, name: str, value: object, choices: Collection[str]) -> None:
    """Raises :class:`LossplugError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise LossplugError(f"{name} is {value!r}", where=where, remedy=suggestion(str(value), choices))


def check_floating(where: str, **tensors: Tensor) -> None:
    """Raises :class:`LossplugError` for a tensor that is not of a real floating dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise LossplugError(f"{name} has dtype {tensor.dtype}, expected a floating dtype", where=where)


def check_same_shape(where: str, **tensors: Tensor) -> None:
    """Raises :class:`LossplugError` unless all shapes are equal; losses never broadcast predictions against targets."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise LossplugError(f"the shapes differ: {shapes}", where=where)


def upcast(x: Tensor) -> Tensor:
    """Returns half-precision tensors as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def row_weights(sample_weight: Tensor, rows: Tensor | torch.Size, like: Tensor, where: str) -> Tensor:
    """Returns sample weights in the shape of the rows; weights of the leading dimensions hold for all that follow.

    Raises:
        LossplugError: The shape is not a leading part of the shape of the rows.
    """
    shape = rows if isinstance(rows, torch.Size) else rows.shape
    if sample_weight.shape != shape[: sample_weight.ndim]:
        raise LossplugError(f"sample_weight {tuple(sample_weight.shape)} doesn't fit rows {tuple(shape)}", where=where)
    weight = sample_weight.to(like)
    return weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim)).expand(shape)


def reduce_weighted(
    rows: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
    anchor: Tensor,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Reduces unweighted rows with optional weights of the same shape; ``mean`` divides by the summed weights."""
    if sample_weight is None:
        return reduce_rows(rows, None, reduction, anchor, denominator)
    return reduce_rows(rows * sample_weight, sample_weight.sum(), reduction, anchor, denominator)
