"""Quantised attention on integers: both of its products in int8, for processors with VNNI instructions (AVX-512)."""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lossplug.native import load_with
from lightning_lossplug.quantization.attention import OPERANDS, AttentionQuant
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.dynamic import Dynamic
from lightning_lossplug.quantization.tape import changed, running_tape
from lightning_lossplug.surgery.attention import unheard

SOURCE = Path(__file__).with_name("attention_bytes.cpp")
LONGEST = 1 << 16  # keys whose products surely fit 32 bits
TYPES = {torch.float32: 4, torch.bfloat16: 2}
PLANS = 32  # kinds of calls whose numbers are kept
TILE = 6  # rows that a product takes at once, as in the source
EACH = 1 << 15  # products of rows and keys that are worth a thread
_INTEGERS = [
    *("batch", "heads", "key_heads", "rows", "keys", "width", "value_width", "size", "causal", "threads"),
    *("query_low", "query_high", "query_shift", "key_low", "key_high", "value_low", "value_high", "top"),
]
_STRIDES = ["query_strides", "key_strides", "value_strides"]
_STEPS = ["query_step", "key_step", "value_step", "probability_step", "scale"]
_POINTERS = ["query", "key", "value", "query_codes", "key_codes", "value_codes", "key_sums", "out"]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_int64 * 3) for name in _STRIDES),
        *((name, ctypes.c_double) for name in _STEPS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@cache
def integer_attention_library() -> ctypes.CDLL | str:
    """Returns the compiled function, or in words why there is none."""
    missing = "this processor has no int8 products (VNNI, AVX-512)"
    library = load_with(SOURCE, _Problem, "lossplug_attention_bytes", missing)
    if not isinstance(library, str):
        library.lossplug_integer_attention.restype = None
    return library


class Numbers(NamedTuple):
    """What the function is told of the quantisers: least and largest codes, and steps."""

    limits: tuple[int, ...]
    steps: tuple[float, ...]


class Plan(NamedTuple):
    """A call without its addresses, and the memory that it needs."""

    problem: _Problem
    room: int
    offsets: tuple[int, ...]


class IntegerAttention(AttentionQuant):
    """The same attention in evaluation, with products of int8 codes where the call allows it.

    Queries, keys, values and probabilities get the codes that :class:`AttentionQuant` rounds them to, up to float32
    rounding of what is rounded. A call with a mask, dropout, gradients, another device or dtype is computed by
    :class:`AttentionQuant`, in floating point.

    Args:
        query: Quantisers with one step and codes that fit a byte, as :func:`integer_attention` makes sure.
        key: Codes fit int8.
        value: Codes fit int8.
        probabilities: Codes from 0.
    """

    def __init__(self, query: Quantizer, key: Quantizer, value: Quantizer, probabilities: Quantizer) -> None:
        super().__init__(query, key, value, probabilities)
        self.numbers = self.read_numbers()
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self.register_load_state_dict_post_hook(_read_again)

    def read_numbers(self) -> Numbers:
        """Returns the numbers of the quantisers as they are now."""
        (low, high), keys, values, (_, top) = (bounds_of(getattr(self, name)) for name in OPERANDS)
        limits = (low, high, max(0, -low), *keys, *values, top)
        return Numbers(limits, tuple(step_of(getattr(self, name)) for name in OPERANDS))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes the arguments of ``F.scaled_dot_product_attention``."""
        if not args and plain_call(query, key, value, **kwargs):
            with unheard():
                return self._on_bytes(query, key, value, kwargs.get("is_causal", False), kwargs.get("scale"))
        return super().forward(query, key, value, *args, **kwargs)

    def _on_bytes(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
        library = integer_attention_library()
        assert not isinstance(library, str)
        shapes = (*query.shape, *value.shape, query.stride(), key.stride(), value.stride())
        kind = (shapes, query.dtype, causal, scale, torch.get_num_threads())
        plan = self._plans.get(kind) or self._plan(kind, query, key, value)
        memory = torch.empty(plan.room, dtype=torch.uint8)
        batch, heads, rows, _ = query.shape
        out = torch.empty(batch, rows, heads, value.shape[-1], dtype=query.dtype)  # as the layer behind it reads it
        problem = _Problem.from_buffer_copy(plan.problem)
        problem.query, problem.key, problem.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        at = memory.data_ptr()
        problem.key_sums, problem.out = at, out.data_ptr()
        problem.key_codes, problem.value_codes, problem.query_codes = (at + offset for offset in plan.offsets)
        library.lossplug_integer_attention(ctypes.byref(problem))
        if (tape := running_tape()) is not None:
            reads = {"query": query, "key": key, "value": value}
            own = dict.fromkeys(("key_sums", "key_codes", "value_codes", "query_codes"), memory)
            tape.add(library.lossplug_integer_attention, problem, reads, own | {"out": out}, self)
        return out.transpose(1, 2)

    def _plan(self, kind: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor) -> Plan:
        *_, causal, scale, available = kind
        (batch, heads, rows, width), (_, key_heads, keys, value_width) = query.shape, value.shape
        across, room = -(-keys // 16) * 16, -(-value_width // 16) * 16
        depth, inner = -(-width // 4) * 4, -(-keys // 4) * 4
        # Key sums, key codes, value codes and query codes, in one piece of memory.
        parts = [batch * key_heads * n for n in (across * 4, depth * across, inner * room)]
        size = sum(parts) + (batch * heads * rows + TILE) * -(-width // 16) * 16
        problem = _Problem(
            *(batch, heads, key_heads, rows, keys, width, value_width, TYPES[query.dtype], causal),
            max(1, min(available, batch * heads * rows * keys // EACH)),
            *self.numbers.limits,
            *((ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (query, key, value)),
            *self.numbers.steps,
            width**-0.5 if scale is None else scale,
        )
        if len(self._plans) >= PLANS:
            self._plans.clear()
        made = self._plans[kind] = Plan(problem, size, tuple(accumulate(parts)))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": {}}  # they hold C structures


def _read_again(attention: IntegerAttention, _: Any) -> None:
    attention.numbers = attention.read_numbers()
    attention._plans.clear()
    changed()


def plain_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether the functions compute such a call of ``F.scaled_dot_product_attention``."""
    tensors = (query, key, value)
    if attn_mask is not None or dropout_p or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    for t in tensors:
        if type(t) is not Tensor or t.device.type != "cpu" or t.dtype != query.dtype or t.ndim != 4 or t.stride(3) != 1:
            return False
    if query.dtype not in TYPES or torch.is_autocast_enabled("cpu"):
        return False
    heads, key_heads = query.shape[1], key.shape[1]
    shared = heads == key_heads or (enable_gqa and heads % key_heads == 0)
    fits = query.shape[0] == key.shape[0] and query.shape[-1] == key.shape[-1] and key.shape[:3] == value.shape[:3]
    return shared and fits and 0 < key.shape[2] <= LONGEST and query.numel() > 0


def bounds_of(quantizer: Quantizer) -> tuple[int, int]:
    """Returns the least and the largest code."""
    bounds: tuple[int, int] = quantizer.bounds  # type: ignore[assignment]
    return bounds


def step_of(quantizer: Quantizer) -> float:
    """Returns the one step."""
    return float(quantizer.grid(torch.zeros(1))[0])


def integer_attention(attention: AttentionQuant) -> IntegerAttention | str:
    """Returns the attention in integers, or why it has to stay in floating point.

    Args:
        attention: With quantisers whose steps are set. It shares them with what is returned.

    Raises:
        LossplugError: Steps that were never set or are not above 0.
    """
    if attention.probabilities is None:
        return "its probabilities are binary, with a number for every row"
    for name, quantizer in attention.quantizers():
        quantizer.check_ready()
        if isinstance(quantizer, Dynamic):
            return f"its {name} has a step per token"
        if not quantizer.has_codes or not hasattr(quantizer, "bounds"):
            return f"{quantizer.name} of its {name} has no integer codes"
        step, zero = quantizer.grid(torch.zeros(1))
        if step.numel() != 1 or (zero is not None and bool((zero != 0).any())):
            return f"its {name} has more than one step, or a zero-point"
        low, high = bounds_of(quantizer)
        least, most = (-128, 127) if name in ("key", "value") else (-128, 255)
        if low < least or high > most or high - low > 255:
            return f"the codes of its {name} are wider than a byte"
    library = integer_attention_library()
    if isinstance(library, str):
        return library
    return IntegerAttention(attention.query, attention.key, attention.value, attention.probabilities)
