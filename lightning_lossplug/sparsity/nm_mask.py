"""Magnitude N:M masks: of every m entries along the reduction axis, the n largest are kept."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity._select import INTEGER_OF_SIZE, fill_mask
from lightning_lossplug.sparsity.bits import pack_rows
from lightning_lossplug.sparsity.native import make_mask, native


@register(
    "mask",
    "nm_mask",
    family="nm_sparsity",
    paper="Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
    arxiv="2102.04010",
)
def nm_mask(
    weight: Tensor,
    n: int,
    m: int,
    dim: Literal["in"] | int = "in",
    scores: Tensor | None = None,
    *,
    check_finite: bool = True,
    packed: bool = False,
) -> Tensor:
    """Returns the N:M mask of a weight.

    An entry is kept if and only if fewer than ``n`` entries of its group come before it in the order (``|weight|``
    descending, index ascending). Ties therefore go to the lower index, on every device and in every dtype, and
    ``-0.0`` ties with ``0.0``. Every group keeps exactly ``n`` entries, also where they are zero.

    Under ``torch.compile`` the mask is one opaque operator: no graph break, no recompilation when values change.

    Args:
        weight: Floating-point tensor of 16, 32 or 64 bits, any strides. Under AMP pass the fp32 master weight: 16-bit
            copies have many ties.
        n: Entries kept per group, ``1 <= n <= m``; ``n == m`` keeps all.
        m: Group size; it has to divide the length of the axis.
        dim: The axis that groups run along. ``"in"`` is the reduction axis of ``Linear`` and convolution weights:
            axis 1, so that a convolution is grouped over its input channels at each place of the kernel, and axis 0 of
            a vector. Weights stored as ``[in, out]``, such as transformers' ``Conv1D``, need 0.
        scores: Replaces ``|weight|``: non-negative, of the shape of ``weight``.
        check_finite: Look for NaN, infinity and negative scores. It costs one pass and on an accelerator waits for the
            device. Without it a NaN counts as larger than infinity, and the sign of a score is ignored.
        packed: Return bits, an eighth of the memory (:func:`~lightning_lossplug.sparsity.unpack_rows` undoes it).

    Returns:
        Bool tensor of the shape of ``weight``, true where an entry is kept; or its bits, uint8 ``[R, ceil(K / 8)]`` for
        R indices of the first axis and K entries each.

    Raises:
        LossplugError: Not a floating-point tensor, a pattern that doesn't fit the axis, scores of another shape, or
            values that can't be ordered, with their number.

    Example:
        >>> nm_mask(torch.tensor([[0.1, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0]]), n=2, m=4).int()
        tensor([[0, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    axis = require_groups(weight, n, m, dim)
    if scores is not None:
        _require_real(scores, "scores")
        if scores.shape != weight.shape:
            raise LossplugError(
                f"scores of shape {tuple(scores.shape)} for a weight of shape {tuple(weight.shape)}",
                remedy="Give one score per entry",
            )
        scores = scores.detach()
    if torch.compiler.is_compiling():
        mask = _mask_op(weight.detach(), scores, n, m, axis, check_finite)
        return pack_rows(mask) if packed else mask
    return _mask(weight.detach(), scores, n, m, axis, check_finite, packed)


def flip_rate(before: Tensor, after: Tensor) -> Tensor:
    """Returns the fraction of entries that two masks disagree on (0-dim); in a healthy run it rises, then falls."""
    return (before != after).mean(dtype=torch.float32)


def group_axis(weight: Tensor, dim: Literal["in"] | int = "in") -> int:
    """Returns the axis that ``dim`` means for this weight, as a non-negative number.

    Raises:
        LossplugError: The weight has no such axis.
    """
    axis = min(1, weight.ndim - 1) if dim == "in" else dim
    if isinstance(axis, bool) or not isinstance(axis, int) or not -weight.ndim <= axis < weight.ndim:
        raise LossplugError(
            f"dim={dim!r} is no axis of a weight of shape {tuple(weight.shape)}", remedy="Give 'in' or an axis number"
        )
    return axis % weight.ndim


def require_pattern(n: int, m: int, where: str | None = None) -> None:
    """Refuses anything but whole numbers with ``1 <= n <= m``.

    Raises:
        LossplugError: The pattern isn't one.
    """
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (n, m))
    if not whole or not 1 <= n <= m:
        raise LossplugError(
            f"n={n!r}, m={m!r} is no N:M pattern", where=where, remedy="Give whole numbers with 1 <= n <= m"
        )


def require_groups(weight: Tensor, n: int, m: int, dim: Literal["in"] | int = "in") -> int:
    """Returns the axis of the groups, if the weight can have such groups.

    Raises:
        LossplugError: It can't.
    """
    _require_real(weight, "weight")
    axis = group_axis(weight, dim)
    require_pattern(n, m)
    if weight.shape[axis] % m:
        raise LossplugError(
            f"groups of m={m} don't divide axis {axis} of a weight of shape {tuple(weight.shape)}",
            remedy="Choose an m that divides it, another dim, or leave this weight dense",
        )
    return axis


def grouped(shape: torch.Size, axis: int, m: int) -> tuple[int, int, int]:
    """Returns the shape ``[groups before the axis, m, entries after it]`` of a contiguous weight."""
    return math.prod(shape[:axis]) * (shape[axis] // m), m, math.prod(shape[axis + 1 :])


def _require_real(values: Tensor, name: str) -> None:
    if not values.is_floating_point() or values.element_size() not in INTEGER_OF_SIZE:
        raise LossplugError(f"the {name} has dtype {values.dtype}", remedy="Give float16, bfloat16, float32 or float64")


def require_finite(values: Tensor, name: str, lowest: float = -math.inf) -> None:
    """Refuses NaN, infinity and values below ``lowest``.

    Raises:
        LossplugError: There are some; it says how many.
    """
    if not values.numel():
        return
    low, high = torch.aminmax(values)
    if bool(low.isfinite() & high.isfinite() & (low >= lowest)):
        return
    finite = values.isfinite()
    count = int((~finite).sum())
    if count:
        raise LossplugError(
            f"{count} of the {values.numel()} entries of the {name} are NaN or infinite",
            remedy="Look for the step that produced them; a mask of such values means nothing",
        )
    raise LossplugError(
        f"{int((values < lowest).sum())} of the {values.numel()} {name} are negative", remedy="Give scores >= 0"
    )


def _mask(weight: Tensor, scores: Tensor | None, n: int, m: int, axis: int, check_finite: bool, packed: bool) -> Tensor:
    source = weight if scores is None else scores
    library = native(weight, source) if n < m and weight.numel() else None
    if check_finite and (library is None or scores is not None):
        require_finite(weight, "weight")
        if scores is not None:
            require_finite(scores, "scores", lowest=0.0)
    if library is not None:
        mask, ordered = make_mask(library, source, n, m, axis, packed)
        if check_finite and not ordered:
            require_finite(weight, "weight")
        return mask
    mask = torch.empty_like(weight, dtype=torch.bool)
    if n == m:
        mask.fill_(True)
    else:
        _fill(mask, source, n, m, axis)
    return pack_rows(mask) if packed else mask


def _fill(mask: Tensor, source: Tensor, n: int, m: int, axis: int) -> None:
    # In the order in which it lies in memory, the weight is [before the axis, axis, after the axis], whatever its
    # strides; only a tensor with holes or overlaps, or scores that lie differently, have to be copied.
    order = sorted(range(mask.ndim), key=lambda place: -mask.stride()[place])
    packed, packed_mask = source.permute(order).contiguous(), mask.permute(order)
    if mask.numel():
        before = math.prod(packed.shape[: order.index(axis)])
        shape = (before * (mask.shape[axis] // m), m, -1)
        fill_mask(packed.view(shape), n, packed_mask.view(shape))


@torch.library.custom_op("lightning_lossplug::nm_mask", mutates_args=())
def _mask_op(weight: Tensor, scores: Tensor | None, n: int, m: int, axis: int, check_finite: bool) -> Tensor:
    return _mask(weight, scores, n, m, axis, check_finite, packed=False)


@_mask_op.register_fake
def _(weight: Tensor, scores: Tensor | None, n: int, m: int, axis: int, check_finite: bool) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bool)
