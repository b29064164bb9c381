"""Attention that was not quantised, in a function of our own, which other functions can be called beside."""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.native import load_with
from lightning_lossplug.quantization.attention_bytes import EACH, TILE, TYPES, plain_call
from lightning_lossplug.quantization.tape import running_tape
from lightning_lossplug.surgery.attention import AttendingLayer, find_attention, plug_attention, unheard
from lightning_lossplug.surgery.plug import WeightTransform

SOURCE = Path(__file__).with_name("attention_floats.cpp")
MANY = 64  # queries that are worth it, however many keys there are
_STRIDES = ("query_strides", "key_strides", "value_strides")
_OPERANDS = ("query", "key", "value")
_OWN = ("query_rows", "key_columns", "value_rows")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "rows", "keys", "width", "value_width")),
        *((name, ctypes.c_int64) for name in ("size", "causal", "threads")),
        *((name, ctypes.c_int64 * 3) for name in _STRIDES),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*_OPERANDS, *_OWN, "out")),
    ]


@cache
def float_attention_library() -> ctypes.CDLL | str:
    """Returns the compiled function, or in words why there is none."""
    library = load_with(
        SOURCE, _Problem, "lossplug_float_attention_bytes", "this processor has no VNNI instructions (AVX-512)"
    )
    if not isinstance(library, str):
        library.lossplug_float_attention.argtypes = [ctypes.c_void_p]
        library.lossplug_float_attention.restype = None
    return library


class FloatAttention(WeightTransform):
    """``F.scaled_dot_product_attention`` of a model in integers, for inference on a CPU.

    Float32 inside; operands are float32 or bfloat16. Calls with a mask, dropout or gradients are torch's, and so are
    those of few queries on many keys, for which the keys would be laid out anew.
    """

    stage: ClassVar[str] = "quantization"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes the arguments of ``F.scaled_dot_product_attention``."""
        if not args and plain_call(query, key, value, **kwargs) and query.shape[2] >= min(key.shape[2], MANY):
            with unheard():
                library = float_attention_library()
                if not isinstance(library, str):
                    return _attend(library, query, key, value, kwargs.get("is_causal", False), kwargs.get("scale"))
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)


def replace_attentions(model: nn.Module) -> int:
    """Lets :class:`FloatAttention` compute the attention of a model that nothing else computes, in place.

    Returns:
        In how many modules.
    """
    if isinstance(float_attention_library(), str):
        return 0
    found = find_attention(model).values()
    modules = [m for m, why in found if why is None and not isinstance(m, AttendingLayer)]
    for module in modules:
        plug_attention(module, FloatAttention().eval())
    return len(modules)


def _attend(
    library: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> Tensor:
    (batch, heads, rows, width), (_, key_heads, keys, value_width) = query.shape, value.shape
    across, room = -(-keys // 16) * 16, -(-value_width // 16) * 16
    parts = ((batch * heads * rows + TILE) * width, batch * key_heads * width * across, batch * key_heads * keys * room)
    memory = torch.empty(sum(parts))
    out = torch.empty(batch, rows, heads, value_width, dtype=query.dtype)  # as the layer behind it reads it
    places = (memory.data_ptr() + 4 * begin for begin in (0, *accumulate(parts[:2])))
    problem = _Problem(
        *(batch, heads, key_heads, rows, keys, width, value_width, TYPES[query.dtype], causal),
        max(1, min(torch.get_num_threads(), batch * heads * rows * keys // EACH)),
        *((ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (query, key, value)),
        width**-0.5 if scale is None else scale,
        *(t.data_ptr() for t in (query, key, value)),
        *(*places, out.data_ptr()),
    )
    library.lossplug_float_attention(ctypes.addressof(problem))
    if (tape := running_tape()) is not None:
        reads = dict(zip(_OPERANDS, (query, key, value), strict=True))
        tape.add(library.lossplug_float_attention, problem, reads, dict.fromkeys(_OWN, memory) | {"out": out}, None)
    return out.transpose(1, 2)
