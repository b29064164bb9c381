"""Inputs to bytes, with one step or one per row, and back: in C++ where it can be, else in PyTorch."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_lossplug.native import load, takes
from lightning_lossplug.quantization.dynamic import dynamic_step

SOURCE = Path(__file__).with_name("rows.cpp")
_EACH = 1 << 14  # entries that are worth a thread
_INTEGER, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


@cache
def _library() -> ctypes.CDLL | None:
    library = load(SOURCE)
    if isinstance(library, str):  # the same integers, some passes more
        return None
    library.lossplug_to_bytes.argtypes = [_POINTER, *[_INTEGER] * 3, _FLOAT, _POINTER, _POINTER, _INTEGER]
    library.lossplug_to_values.argtypes = [*[_POINTER] * 3, *[_INTEGER] * 3, _POINTER, _INTEGER]
    library.lossplug_with_step.argtypes = [_POINTER, _INTEGER, _INTEGER, _FLOAT, *[_INTEGER] * 3, _POINTER, _INTEGER]
    library.lossplug_with_step.restype = library.lossplug_to_bytes.restype = library.lossplug_to_values.restype = None
    return library


def to_bytes(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Returns the codes of every row plus ``top``, uint8 ``[R, C]``, and the rows' steps, float32 ``[R, 1]``.

    Args:
        x: ``[R, C]``; float32 or bfloat16 are fastest.
        top: Largest code, 1 to 127: rows reach from ``-top`` to ``top`` (:func:`dynamic_step`).
    """
    if x.dtype in (torch.float32, torch.bfloat16) and takes(x) and (library := _library()) is not None:
        out, steps = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
        library.lossplug_to_bytes(
            x.data_ptr(), x.element_size(), *x.shape, top, out.data_ptr(), steps.data_ptr(), _threads(x)
        )
        return out, steps
    x = x.float()
    steps = dynamic_step(x, top.bit_length() + 1)
    return (x / steps).round_().add_(top).to(torch.uint8), steps


def with_step(x: Tensor, step: Tensor, zero: int, bounds: tuple[int, int]) -> Tensor:
    """Returns ``round(x / step) + zero`` within bounds, ties to even, as uint8 of x's shape.

    Args:
        x: Any shape; float32 or bfloat16 are fastest.
        step: One number, float32.
        zero: Byte of the value 0.
        bounds: Least and largest byte.
    """
    rows = x.movedim(1, -1) if x.ndim == 4 and not x.is_contiguous() else x  # channels last lie there in a row, too
    if x.dtype in (torch.float32, torch.bfloat16) and takes(rows) and (library := _library()) is not None:
        out = torch.empty_like(x, dtype=torch.uint8)
        size = (x.element_size(), x.numel(), float(step), zero, *bounds, out.data_ptr(), _threads(x))
        library.lossplug_with_step(x.data_ptr(), *size)
        return out
    return (x.float() / step).round_().add_(zero).clamp_(*bounds).to(torch.uint8)


def to_values(y: Tensor, steps: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns ``y * steps + bias``.

    Args:
        y: Float32 ``[R, C]``; may be overwritten.
        steps: Float32 ``[R, 1]``.
        bias: Float32 ``[C]`` or None.
        dtype: Of the result.
    """
    given = (y, steps) if bias is None else (y, steps, bias)
    if dtype in (torch.float32, torch.bfloat16) and takes(*given) and (library := _library()) is not None:
        out = y if dtype == torch.float32 else torch.empty(y.shape, dtype=dtype)
        added = 0 if bias is None else bias.data_ptr()
        size = (out.element_size(), *y.shape, out.data_ptr(), _threads(y))
        library.lossplug_to_values(y.data_ptr(), steps.data_ptr(), added, *size)
        return out
    y = y * steps
    return (y if bias is None else y + bias).to(dtype)


def _threads(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // _EACH))
