"""Steps and ranges of least squared error, by search."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_lossplug.native import load, reachable
from lightning_lossplug.quantization.grid import EPS, upcast
from lightning_lossplug.quantization.observers import minmax_range

SOURCE = Path(__file__).with_name("least_error.cpp")
FRACTIONS = tuple(1 - 0.01 * i for i in range(80))
_EACH = 1 << 12  # entries that are worth a thread
BINS = 4096
DRAWN = 1 << 22


@cache
def _library() -> ctypes.CDLL | None:
    library = load(SOURCE)
    if isinstance(library, str):  # the same search in PyTorch, six to ten times as slow
        return None
    integer, real, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    library.lossplug_least_error.argtypes = [
        *(pointer, integer, integer, pointer, pointer, integer),
        *(ctypes.c_float, real, real, pointer, pointer, integer),
    ]
    library.lossplug_least_error.restype = None
    return library


def scale_of_range(x: Tensor, dims: Sequence[int], qn: float, qp: float) -> Tensor:
    """Returns the least step whose grid ``[qn, qp] * step`` holds all values."""
    lo, hi = minmax_range(x, dims)
    return torch.maximum(hi / qp, lo / qn if qn else torch.zeros_like(lo)).clamp_min(0)


def mse_step(x: Tensor, dims: Sequence[int], qn: float, qp: float) -> Tensor:
    """Returns the step with the least squared error among 80 fractions, 0.21 to 1, of the min-max step.

    Where one step is for more than four million values, as of a layer's input, that many are drawn, always the same.

    Args:
        x: Any shape.
        dims: Axes that share a step; they are kept with a length of 1.
        qn: Least code.
        qp: Largest code.
    """
    full = scale_of_range(x, dims, qn, qp)
    if full.numel() == 1 and x.numel() > DRAWN:
        generator = torch.Generator(x.device).manual_seed(0)
        drawn = torch.randint(x.numel(), (DRAWN,), generator=generator, device=x.device)
        x = x.flatten()[drawn].reshape(*[1] * (x.ndim - 1), -1)
    kept = [d for d in range(x.ndim) if d not in dims]
    if x.dtype == torch.float32 and x.numel() and reachable(x) and (library := _library()) is not None:
        rows = x.detach().permute(*kept, *dims).reshape(full.numel(), -1).contiguous()
        fractions, best = torch.tensor(FRACTIONS), torch.empty_like(full)
        errors = torch.zeros(len(rows), len(FRACTIONS), dtype=torch.float64)
        threads = max(1, min(torch.get_num_threads(), rows.numel() // _EACH))
        sizes = (*rows.shape, full.data_ptr(), fractions.data_ptr(), len(FRACTIONS), EPS, qn, qp)
        library.lossplug_least_error(rows.data_ptr(), *sizes, errors.data_ptr(), best.data_ptr(), threads)
        return best
    best, least = full, torch.full_like(full, torch.inf)
    for fraction in FRACTIONS:
        step = full * fraction
        safe = step.clamp_min(EPS)
        error = (x - (x / safe).clamp(qn, qp).round() * safe).square().mean(list(dims), keepdim=True)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


def mse_ends(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Returns the ends of the evenly spaced levels with the least squared error, zero among what they span.

    Where :func:`~lightning_lossplug.quantization.observers.mse_range` shrinks both ends alike, here least and largest
    value (or 0) each shrink by 0, 5 ... 95 percent, in all combinations. Values count by a histogram, whose bins are at
    least thirteen times as narrow as the steps of four bits that are tried.

    Args:
        x: Any shape; one range for all of it.
        levels: How many, 2 or more.
    """
    x = upcast(x.detach())
    lo, hi = x.min().clamp_max(0), x.max().clamp_min(0)
    if not bool(hi > lo):
        return lo, hi
    counts = torch.histc(x, BINS, float(lo), float(hi)).double()
    centres = lo.double() + (hi - lo).double() * (torch.arange(BINS, device=x.device, dtype=torch.float64) + 0.5) / BINS
    shrunk = 1 - 0.05 * torch.arange(20, device=x.device, dtype=torch.float64)
    low, high = (end.reshape(-1, 1) for end in torch.meshgrid(lo * shrunk, hi * shrunk, indexing="ij"))
    step = (high - low) / (levels - 1)
    code = ((centres - low) / step).round_().clamp_(0, levels - 1)
    best = ((code * step + low - centres).square() @ counts).argmin()
    return low[best, 0].to(x.dtype), high[best, 0].to(x.dtype)
