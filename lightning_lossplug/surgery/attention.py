"""Attention modules that nobody edits, whose ``F.scaled_dot_product_attention`` something else computes.

Like a plugged layer, the module gets another class in place: a subclass whose ``forward`` listens while the module's
own runs and hands its functional attention calls to a transform. What the module holds, its keys and its hooks stay.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.surgery.plug import SwappedLayer, WeightTransform, plain_class, transforms_name
from lightning_lossplug.surgery.select import layer_kinds

ATTENTION = "attention"  # in the place of a parameter's name
# What the code of an attention module names: torch's function, or the table in which transformers finds it.
CALLED = {"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"}


class AttendingLayer(SwappedLayer):
    """Mixin of every attention module whose attention is computed by a transform."""

    own_stack = transforms_name(ATTENTION)


class Listening(TorchFunctionMode):
    """A mode that has no interest in what is computed within :func:`unheard`."""


class _Listener(Listening):
    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self.compute if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))


def unheard() -> AbstractContextManager[Any]:
    """Returns a context whose functions nobody listens to, no attending module and no tape, for code without attention.

    Listening costs microseconds at every call, which the integer layers of a small model would feel.
    """
    depth = 0 if torch.compiler.is_compiling() else torch._C._len_torch_function_stack()
    if depth and isinstance(torch._C._get_function_stack_at(depth - 1), Listening):
        return torch._C.DisableTorchFunction()  # type: ignore[no-any-return]
    return _NOTHING


_NOTHING = nullcontext()
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def attending_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass whose attention a transform computes."""
    if cls not in _CLASSES:

        @functools.wraps(cls.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            stack: Any = self._modules[transforms_name(ATTENTION)]
            with _Listener(stack["quantization"]):
                return cls.forward(self, *args, **kwargs)

        namespace = {
            "forward": forward,
            # The class exists only here, so pickle and deepcopy rebuild it from the plain class.
            "__reduce_ex__": lambda self, protocol: (_rebuild, (cls, vars(self).copy())),
            "__module__": cls.__module__,
        }
        _CLASSES[cls] = type(f"Attending{cls.__name__}", (AttendingLayer, cls), namespace)
    return _CLASSES[cls]


def _rebuild(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    layer = cls.__new__(cls)
    layer.__class__ = attending_class(cls)
    vars(layer).update(state)
    return layer


def attention_of(layer: nn.Module) -> Any:
    """Returns the transform that computes a module's attention, or None."""
    stack = layer._modules.get(transforms_name(ATTENTION))
    return None if stack is None else stack._modules["quantization"]


def attending_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the modules whose attention a transform computes, with their paths."""
    for name, layer in model.named_modules():
        if isinstance(layer, AttendingLayer):
            yield name, layer


def plug_attention(layer: nn.Module, transform: WeightTransform, *, where: str = "attention") -> None:
    """Lets a transform compute the functional attention of a module.

    Args:
        layer: A module whose ``forward`` calls ``F.scaled_dot_product_attention``.
        transform: Called with the arguments of that function; in the stage of quantisation.
        where: Module path, for messages.

    Raises:
        LossplugError: Something computes it already.
    """
    if isinstance(layer, AttendingLayer):
        raise LossplugError(
            "two techniques want to compute its attention", where=where, remedy="Give each technique layers of its own"
        )
    weight = next(layer.parameters(), None)
    layer.add_module(transforms_name(ATTENTION), nn.ModuleDict())
    stack: Any = layer._modules[transforms_name(ATTENTION)]
    stack[transform.stage] = transform if weight is None else transform.to(weight.device)
    layer.__class__ = attending_class(type(layer))


def replace_attention(layer: nn.Module, transform: WeightTransform) -> None:
    """Lets another transform compute the attention of a module that has one."""
    stack: Any = layer._modules[transforms_name(ATTENTION)]
    stack[transform.stage] = transform


def unplug_attention(layer: nn.Module) -> None:
    """Gives a module its own attention back."""
    if isinstance(layer, AttendingLayer):
        layer.give_back_class()


def find_attention(model: nn.Module) -> dict[str, tuple[Any, str | None]]:
    """Returns the attention modules of a model by path, each with the reason why it can't be plugged, or None.

    A module is one when the code of its ``forward``, or a function that this calls, names
    ``F.scaled_dot_product_attention`` (timm and most models of one's own) or transformers' table of such functions.
    """
    found: dict[str, tuple[Any, str | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found[name] = module, "nn.MultiheadAttention attends inside one function of torch"
        elif isinstance(module, AttendingLayer):
            found[name] = module, None
        elif isinstance(module, WeightTransform) or type(module).__module__.startswith("torch.nn."):
            continue
        elif _names(type(module)) & CALLED:  # type: ignore[arg-type]
            found[name] = module, _reason(module)
    return found


def _reason(module: nn.Module) -> str | None:
    kind = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if kind != "sdpa":
        return f"it attends by {kind!r}; load the model with attn_implementation='sdpa'"
    if getattr(module, "fused_attn", True) is False:
        return "its fused_attn is False: it would call the function after TIMM_FUSED_ATTN=2 in the environment"
    if layer_kinds(module):
        return f"a {plain_class(module).__name__} holds weights of its own"
    return None


@functools.cache
def _names(cls: type[nn.Module]) -> frozenset[str]:
    forward = inspect.unwrap(cls.forward)
    if not isinstance(forward, FunctionType):
        return frozenset()
    names = set(forward.__code__.co_names)
    for name in forward.__code__.co_names:
        helper = inspect.unwrap(getattr(cls, name, None) or forward.__globals__.get(name) or forward)
        if isinstance(helper, FunctionType):
            names.update(helper.__code__.co_names)
    return frozenset(names)
