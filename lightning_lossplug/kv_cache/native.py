"""The attention over codes as one C++ function for CPUs, compiled at first use with the compiler that is there."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_lossplug.kv_cache.latent import LatentDecoders, LatentTokens
from lightning_lossplug.native import load_with

SOURCE = Path(__file__).with_name("latent_attention.cpp")
PAD = 16  # floats, as in the source
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INTEGERS = [
    *("batch", "heads", "rows", "width", "value_width", "half", "k_rank", "v_rank", "k_bits", "v_bits", "code_type"),
    *("table_type", "pages", "table_batch", "window", "sinks", "threads", "mask_batch", "mask_head", "mask_row"),
]
_POINTERS = [
    *("query", "exact_query", "k_decode", "k_mean", "v_decode", "v_mean", "page_tokens", "table_tokens", "k_codes"),
    *("k_ranges", "v_codes", "v_ranges", "tables", "window_keys", "window_values", "sink_columns", "sink_keys"),
    *("sink_values", "mask", "out"),
]


class Problem(ctypes.Structure):
    """The arguments, as in the source."""

    _fields_ = [(n, ctypes.c_int64) for n in _INTEGERS] + [(n, ctypes.c_void_p) for n in _POINTERS]


@cache
def native_library() -> ctypes.CDLL | str:
    """Returns the compiled function, or in words why there is none."""
    return load_with(SOURCE, Problem, "lossplug_problem_bytes", "its arguments have another layout")


@cache
def native_or_warn() -> ctypes.CDLL | None:
    """Returns the compiled function; or None after one line that says why not."""
    library = native_library()
    if isinstance(library, str):
        warnings.warn(f"attention over codes runs in PyTorch, since its C++ function can't be used: {library}")
        return None
    return library


class NativeDecoders:
    """Decoders as the function reads them: float32, by head, rows padded to 16 floats."""

    def __init__(self, decoders: LatentDecoders) -> None:
        self.k_decode = _padded(decoders.keys.unflatten(1, (decoders.heads, -1)).transpose(0, 1))
        self.v_decode = _padded(decoders.values)
        mean = decoders.key_mean
        self.k_mean = None if mean is None else _padded(mean.unflatten(0, (decoders.heads, -1)))
        self.v_mean = None if decoders.value_mean is None else _padded(decoders.value_mean[:, 0])
        self.order = decoders.pairing.order
        self.ordered = decoders.pairing.in_halves


def _padded(tensor: Tensor) -> Tensor:
    return torch.nn.functional.pad(tensor.float(), (0, -tensor.shape[-1] % PAD)).contiguous()


def native_fits(tokens: LatentTokens) -> bool:
    """Whether the function can read what a layer holds."""
    kept = (*tokens.key_codes.parts, *tokens.value_codes.parts, *tokens.tables.tables.pages)
    return tokens.keys.device.type == "cpu" and tokens.keys.dtype in _TYPES and all(t.is_contiguous() for t in kept)


def native_attention(
    library: ctypes.CDLL,
    query: Tensor,
    tokens: LatentTokens,
    decoders: NativeDecoders,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns what :func:`lightning_lossplug.kv_cache.latent.latent_attention` returns, in float32 throughout.

    Args:
        library: From :func:`native_library`.
        query: Rotated queries, ``[batch, heads, rows, d]``.
        tokens: What they attend to, on the CPU.
        decoders: The decoders of ``tokens``, prepared once.
        scale: Of the scores.
        mask: Added to the scores, ``[batch or 1, heads or 1, rows or 1, T]``; None for none.
    """
    batch, heads, rows, width = query.shape
    exact = (query.float() * scale).contiguous()
    ordered = exact if decoders.ordered else exact[..., decoders.order].contiguous()
    keys, values = tokens.keys.float().contiguous(), tokens.values.float().contiguous()
    out = torch.empty(batch, heads, rows, values.shape[-1])
    tables = tokens.tables.tables.pages[: tokens.key_codes.pages]
    p = Problem(
        batch=batch, heads=heads, rows=rows, width=width, value_width=values.shape[-1],
        half=tokens.decoders.pairing.half, k_rank=tokens.key_codes.rank, v_rank=tokens.value_codes.rank,
        k_bits=tokens.key_codes.bits, v_bits=tokens.value_codes.bits, code_type=_TYPES[tokens.keys.dtype],
        table_type=_TYPES[tables[0].dtype], pages=len(tables), table_batch=tables[0].shape[1], window=keys.shape[2],
        threads=torch.get_num_threads(), query=ordered.data_ptr(), exact_query=exact.data_ptr(),
        k_decode=decoders.k_decode.data_ptr(), v_decode=decoders.v_decode.data_ptr(), window_keys=keys.data_ptr(),
        window_values=values.data_ptr(), out=out.data_ptr(),
    )  # fmt: skip
    kept: list[object] = [
        _pointers(p, name, store.forms[index].pages)
        for name, store, index in (
            ("k_codes", tokens.key_codes, 0),
            ("k_ranges", tokens.key_codes, -1),
            ("v_codes", tokens.value_codes, 0),
            ("v_ranges", tokens.value_codes, -1),
        )
    ]
    kept.append(_pointers(p, "tables", tables))
    kept.append(_lengths(p, "page_tokens", [page.shape[1] for page in tokens.key_codes.forms[0].pages]))
    kept.append(_lengths(p, "table_tokens", [page.shape[2] for page in tables]))
    if decoders.k_mean is not None:
        p.k_mean = decoders.k_mean.data_ptr()
    if decoders.v_mean is not None:
        p.v_mean = decoders.v_mean.data_ptr()
    if tokens.sinks is not None:
        columns, sink_keys, sink_values = (t.contiguous() for t in tokens.sinks)
        floats = sink_keys.float(), sink_values.float()
        kept += [columns, *floats]
        p.sinks, p.sink_columns = columns.shape[1], columns.data_ptr()
        p.sink_keys, p.sink_values = (t.data_ptr() for t in floats)
    if mask is not None:
        mask = mask.float().contiguous()
        kept.append(mask)
        p.mask = mask.data_ptr()
        strides = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
        p.mask_batch, p.mask_head, p.mask_row = strides[:3]
    library.lossplug_latent_attention(ctypes.byref(p))
    return out.to(query.dtype)


def _pointers(problem: Problem, name: str, tensors: list[Tensor]) -> object:
    array = (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
    setattr(problem, name, ctypes.addressof(array))
    return array


def _lengths(problem: Problem, name: str, values: list[int]) -> object:
    array = (ctypes.c_int64 * len(values))(*values)
    setattr(problem, name, ctypes.addressof(array))
    return array
