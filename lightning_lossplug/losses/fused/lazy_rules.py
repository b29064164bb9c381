"""What may happen to logits between a linear head and its loss, as changes of the head's arguments.

A rule takes the form of the logits, the function called on them and its further arguments, and returns the form of the
result; None where the result is not that of a linear head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """Logits ``factor (h W^T + b)``, or ``outer tanh(factor (h W^T + b))``.

    Args:
        hidden: ``h``, [..., D].
        weight: ``W``, [V, D].
        bias: ``b``, [V] or None.
        dtype: Dtype of the logits.
        factor: Scale inside.
        outer: Scale outside, with the tanh; None: no tanh.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    factor: float = 1.0
    outer: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits."""
        return (*self.hidden.shape[:-1], self.weight.shape[0])

    @property
    def fusable(self) -> bool:
        """Whether the chunked head can take them (a softcap is positive)."""
        return self.outer is None or self.outer > 0


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.ndim == 0 and not value.requires_grad else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _scaled(form: Form, func: Any, other: Any, **kwargs: Any) -> Form | None:
    number = _number(other)
    if number is None or number == 0 or kwargs:
        return None
    number = 1 / number if func in _DIVISIONS else number
    if form.outer is None:
        return replace(form, factor=form.factor * number)
    return replace(form, outer=form.outer * number)


def _tanh(form: Form, func: Any) -> Form | None:
    return replace(form, outer=1.0) if form.outer is None else None


def _plus(form: Form, func: Any, other: Any, **kwargs: Any) -> Form | None:
    plain = form.outer is None and form.factor == 1 and not kwargs
    if not plain or type(other) not in (Tensor, nn.Parameter, nn.Buffer) or other.requires_grad:
        return None
    classes = form.weight.shape[0]
    if other.numel() != classes or other.shape[-1:] != (classes,) or other.ndim > len(form.shape):
        return None
    bias = other.reshape(-1).to(form.weight.dtype)
    bias = bias if form.bias is None else form.bias + bias
    return replace(form, bias=bias, dtype=torch.promote_types(form.dtype, other.dtype))


def _converted(form: Form, func: Any, *args: Any, **kwargs: Any) -> Form | None:
    """Nothing to do for float32: the chunked head's statistics are float32, or float64 for a float64 head."""
    probe = func(torch.empty(0, dtype=form.dtype, device=form.hidden.device), *args, **kwargs)
    if probe.dtype not in (form.dtype, torch.float32) or probe.device != form.hidden.device:
        return None
    return replace(form, dtype=probe.dtype)


def _reshaped(form: Form, func: Any, *args: Any, **kwargs: Any) -> Form | None:
    shape = func(torch.empty(form.shape, device="meta"), *args, **kwargs).shape
    if shape[-1:] != form.shape[-1:]:
        return None
    return replace(form, hidden=form.hidden.reshape(*shape[:-1], form.hidden.shape[-1]))


def _sliced(form: Form, func: Any, index: Any) -> Form | None:
    """Indexing of the rows, and dropping of the last columns (padding of the vocabulary)."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(entry is ... or isinstance(entry, (slice, int, Tensor)) for entry in entries):
        return None
    if any(isinstance(entry, bool) for entry in entries):
        return None
    masks = (e.ndim if isinstance(e, Tensor) and e.dtype == torch.bool else 1 for e in entries if e is not ...)
    rest = [slice(None)] * (len(form.shape) - sum(masks))
    place = next((i for i, entry in enumerate(entries) if entry is ...), None)
    if place is None:
        entries += rest
    else:
        entries[place : place + 1] = rest
    *leading, last = entries
    if not isinstance(last, slice) or last.start not in (None, 0) or last.step not in (None, 1):
        return None
    columns = len(range(*last.indices(form.shape[-1])))
    if columns == 0:
        return None
    if columns < form.shape[-1]:
        bias = None if form.bias is None else form.bias[:columns]
        form = replace(form, weight=form.weight[:columns], bias=bias)
    return replace(form, hidden=form.hidden[(*leading, slice(None))])


_T = torch.Tensor
_DIVISIONS: set[Callable[..., Any]] = {
    _T.div,
    _T.true_divide,
    _T.__truediv__,
    _T.divide,
    torch.div,
    torch.true_divide,
    torch.divide,
}
RULES: dict[Callable[..., Any], Callable[..., Form | None]] = {
    **dict.fromkeys((*_DIVISIONS, _T.mul, _T.__mul__, _T.__rmul__, _T.multiply, torch.mul, torch.multiply), _scaled),
    **dict.fromkeys((_T.tanh, torch.tanh), _tanh),
    **dict.fromkeys((_T.add, _T.__add__, torch.add), _plus),
    **dict.fromkeys((_T.float, _T.to, _T.contiguous), _converted),
    **dict.fromkeys((_T.view, _T.reshape, _T.flatten, torch.reshape, torch.flatten), _reshaped),
    _T.__getitem__: _sliced,
}
WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__"}
METADATA = {
    _T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.is_floating_point, _T.is_complex,
    _T.get_device, _T.is_contiguous, _T.__len__, _T.__hash__, _T.register_hook, _T.is_inference,
    torch.is_floating_point, torch.is_complex, torch.numel,
    *(
        getattr(_T, name).__get__
        for name in (
            "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu",
            "is_meta", "is_sparse", "is_quantized", "is_mps", "is_xpu", "is_nested", "itemsize", "_version",
        )
    ),
}  # fmt: skip
