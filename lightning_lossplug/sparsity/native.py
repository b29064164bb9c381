"""The C++ functions of masks on tensors; each caller has a way in PyTorch for what these do not take.

They take plain contiguous tensors on a CPU, and not under anything that watches operators go by (``torch.compile``,
tracing, fake tensors, ``torch.func``): it would not see them.
"""

from __future__ import annotations

import ctypes
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_lossplug.native import load, takes

SOURCE = Path(__file__).with_name("masks.cpp")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_EACH = 1 << 16  # entries that are worth a thread
_INTEGER, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_ARGUMENTS = {
    "lossplug_nm_mask": [_POINTER, *[_INTEGER] * 8, _POINTER, _INTEGER, _INTEGER],
    "lossplug_changed": [_POINTER, _POINTER, _INTEGER],
    "lossplug_keep": [*[_POINTER] * 3, *[_INTEGER] * 4],
    "lossplug_scale": [*[_POINTER] * 3, *[_INTEGER] * 3, _FLOAT, _FLOAT, _INTEGER],
    "lossplug_pull": [*[_POINTER] * 3, *[_INTEGER] * 3, _FLOAT, _INTEGER],
}


class _Scratch(threading.local):
    wanted = False
    storage: torch.UntypedStorage | None = None


_scratch = _Scratch()


@contextmanager
def for_a_moment() -> Iterator[None]:
    """What :func:`room_for` returns meanwhile is for one product, so that the next one may get the same memory.

    Fresh memory has to be mapped page by page, which costs as much as masking a weight does.
    """
    before, _scratch.wanted = _scratch.wanted, True
    try:
        yield
    finally:
        _scratch.wanted = before


def room_for(values: Tensor) -> Tensor:
    """Returns an empty tensor like ``values``: in the thread's one buffer if wanted and not held."""
    if not _scratch.wanted:
        return torch.empty_like(values)
    storage = _scratch.storage
    if storage is not None and torch._C._storage_Use_Count(storage._cdata) > 1:
        return torch.empty_like(values)
    if storage is None or storage.nbytes() < values.nbytes:
        storage = _scratch.storage = torch.UntypedStorage(values.nbytes)
    return torch.empty(0, dtype=values.dtype).set_(storage, 0, values.shape, values.stride())


@cache
def _library() -> ctypes.CDLL | None:
    library = load(SOURCE)
    if isinstance(library, str):
        warnings.warn(f"N:M masks are made in PyTorch (slower), since their C++ functions can't be used: {library}")
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = _INTEGER if name in ("lossplug_changed", "lossplug_nm_mask") else None
    return library


def native(*tensors: Tensor) -> ctypes.CDLL | None:
    """Returns the functions if they can work on these tensors, or None."""
    return _library() if takes(*tensors) else None


def make_mask(library: ctypes.CDLL, source: Tensor, n: int, m: int, axis: int, packed: bool) -> tuple[Tensor, bool]:
    """Returns the N:M mask, bool or in bits, and whether all entries are finite.

    Args:
        library: From :func:`native`.
        source: Not empty; its magnitudes order the entries of a group.
        n: Entries kept per group.
        m: Group size, a divisor of the axis.
        axis: The axis of the groups.
        packed: Whether to return bits (:func:`~lightning_lossplug.sparsity.bits.pack_rows`).
    """
    rows, length = source.shape[0], math.prod(source.shape[1:])
    inner = math.prod(source.shape[axis + 1 :])
    units = rows // m if axis == 0 else rows  # parts of the weight that hold whole rows and whole groups
    shape = (rows, (length + 7) // 8) if packed else source.shape
    out = torch.empty(shape, dtype=torch.uint8 if packed else torch.bool)
    groups = rows * length // (units * m * inner)
    unordered = library.lossplug_nm_mask(
        source.data_ptr(), _DTYPES[source.dtype], rows, length, units, groups, m, inner, n, out.data_ptr(), packed,
        _threads(source),
    )  # fmt: skip
    return out, not unordered


def changed(library: ctypes.CDLL, before: Tensor, after: Tensor) -> int:
    """Returns how many bits of two tensors of one shape differ."""
    return int(library.lossplug_changed(*_pointers(before, after), before.numel()))


def keep(library: ctypes.CDLL, values: Tensor, bits: Tensor, out: Tensor) -> Tensor:
    """Writes ``values`` where a bit is set and ``+0.0`` elsewhere; ``out`` may be ``values``."""
    library.lossplug_keep(*_pointers(values, bits, out), values.element_size(), *_rows(values.shape), _threads(values))
    return _changed(out) if out is values else out


def scale(library: ctypes.CDLL, values: Tensor, bits: Tensor, out: Tensor, kept: float, pruned: float) -> Tensor:
    """Writes ``values`` times ``kept`` or ``pruned``, float32 or float64; ``out`` may be ``values``."""
    size = (values.element_size(), *_rows(values.shape))
    library.lossplug_scale(*_pointers(values, bits, out), *size, kept, pruned, _threads(values))
    return _changed(out) if out is values else out


def pull(library: ctypes.CDLL, grad: Tensor, weight: Tensor, bits: Tensor, strength: float) -> Tensor:
    """Adds ``strength * weight`` where a bit isn't set, in place; float32 or float64."""
    size = (weight.element_size(), *_rows(weight.shape))
    library.lossplug_pull(*_pointers(grad, weight, bits), *size, strength, _threads(weight))
    return _changed(grad)


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _threads(tensor: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), tensor.numel() // _EACH))


def _changed(tensor: Tensor) -> Tensor:
    torch.autograd.graph.increment_version(tensor)
    return tensor
