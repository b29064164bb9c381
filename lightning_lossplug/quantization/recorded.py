"""Modules of a model in integers that run as one function call: blocks of a ViT, or all of them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from lightning_lossplug.native import takes
from lightning_lossplug.quantization.gated_layer import GatedLayer
from lightning_lossplug.quantization.integer_layer import IntegerLayer
from lightning_lossplug.quantization.norm_rows import NormRows
from lightning_lossplug.quantization.tape import Program, changes, running_tape, taped
from lightning_lossplug.surgery.attention import AttendingLayer, attending_class
from lightning_lossplug.surgery.plug import WeightTransform
from lightning_lossplug.surgery.trace import undisturbed

OURS = (IntegerLayer, GatedLayer, NormRows)
KINDS = 8  # kinds of inputs whose programs are kept


class RecordedModule:
    """Mixin of a module that is made of C++ functions alone, and calls them in one go.

    The second call with a kind of input (shape, dtype, threads) is written down, and the next ones run that.
    What it holds, its keys and what it returns stay as they were. Inputs of another dtype, gradients, training,
    hooks on what is inside, ``torch.compile`` and tracing get the forward it always had.
    """


class _Programs:
    """The programs of a module, by the kind of the input; None for one that was seen once, text for one that can't."""

    def __init__(self, module: nn.Module) -> None:
        self.found: dict[tuple[Any, ...], Program | str | None] = {}
        inside = [m for m in module.modules() if m is not module]
        self.hooks = [h for m in inside for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.parts = [(m._modules, tuple(m._modules.values())) for m in module.modules() if m._modules]
        self.version = changes()

    def holds(self) -> bool:
        """Tells whether nothing has other numbers or was replaced since."""
        return self.version == changes() and all(tuple(now.values()) == then for now, then in self.parts)

    def take(self, kind: tuple[Any, ...]) -> Program | str | None:
        """Returns what is known of a kind of input; notes it if nothing is."""
        if kind in self.found:
            return self.found[kind]
        if len(self.found) >= KINDS:
            self.found.pop(next(iter(self.found)))
        self.found[kind] = None
        return "it is new"


def _usable(module: nn.Module, x: Any) -> bool:
    if module.training or not isinstance(x, Tensor) or not takes(x) or running_tape() is not None or not x.numel():
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return not hooks._has_any_global_hook() and not torch.is_autocast_enabled("cpu")


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _recorded_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _CLASSES:

        @functools.wraps(cls.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            plain = len(args) == 1 and all(value is None for value in kwargs.values())
            if not plain or not _usable(self, args[0]):
                return cls.forward(self, *args, **kwargs)
            programs, x = _programs(self), args[0]
            if any(programs.hooks):
                return cls.forward(self, *args, **kwargs)
            kind = (x.shape, x.dtype, torch.get_num_threads(), *kwargs)
            program = programs.take(kind)
            if program is None:
                with taped(x) as tape:
                    y = cls.forward(self, *args, **kwargs)
                programs.found[kind] = tape.program(y) if isinstance(y, Tensor) else "it returns no tensor"
                return y
            return program(x) if isinstance(program, Program) else cls.forward(self, *args, **kwargs)

        namespace = {"forward": forward, "__reduce_ex__": _reduce, "__module__": cls.__module__}
        _CLASSES[cls] = type(f"Recorded{cls.__name__}", (RecordedModule, cls), namespace)
    return _CLASSES[cls]


def _programs(module: nn.Module) -> _Programs:
    found = module.__dict__.get("_programs")
    if found is None or not found.holds():
        found = module.__dict__["_programs"] = _Programs(module)
    return found  # type: ignore[no-any-return]


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # The class exists only here, so pickle and deepcopy rebuild it from the plain class.
    base, state = type(module).__bases__[1], module.__getstate__()
    attends = issubclass(base, AttendingLayer)
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name != "_programs"}
    return _new, (base.__bases__[1] if attends else base, attends), state


def _new(cls: type[nn.Module], attends: bool) -> nn.Module:
    made = _recorded_class(attending_class(cls) if attends else cls)
    return made.__new__(made)


@torch.no_grad()
def record_modules(model: nn.Module) -> int:
    """Makes the largest modules that are made of C++ functions alone :class:`RecordedModule`, in place.

    Each is tried on numbers first.

    Returns:
        How many.
    """
    count = 0
    for child in model.children():
        if isinstance(child, OURS):
            continue
        if _works(child):
            child.__class__ = _recorded_class(type(child))
            count += 1
        else:
            count += record_modules(child)
    return count


def _works(module: nn.Module) -> bool:
    layers = [m for m in module.modules() if isinstance(m, (IntegerLayer, NormRows))]
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or len(layers) < 2 or module.training:
        return False
    if not any(isinstance(m, IntegerLayer) and m.function is not None for m in layers):
        return False
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is inspect.Parameter.empty]
    if len([p for p in needed if p.kind is not inspect.Parameter.VAR_KEYWORD]) != 1:
        return False
    first = layers[0]
    return _same(module, first.codes.shape[1] if isinstance(first, IntegerLayer) else len(first.weight))


def _same(module: nn.Module, width: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, 5, width, generator=generator) for _ in range(2))
    with undisturbed(module):
        before = _kept(module)
        try:
            with taped(x) as tape:
                y = module(x)
            program = tape.program(y) if isinstance(y, Tensor) else "it returns no tensor"
            alone = isinstance(program, Program) and len(program) > 1 and _kept(module) == before
            return alone and torch.equal(program(other), module(other))  # type: ignore[operator]
        except Exception:  # whatever a foreign forward does with such an input
            return False


def _kept(module: nn.Module) -> dict[tuple[str, str], tuple[int, int]]:
    # What a forward may leave behind in a module of somebody's, which a program would not.
    foreign = [(n, m) for n, m in module.named_modules() if not isinstance(m, (*OURS, WeightTransform))]
    found = [(n, key, value) for n, m in foreign for key, value in (vars(m) | m._buffers).items()]
    return {(n, key): (id(v), len(v) if isinstance(v, (list, dict, set)) else 0) for n, key, v in found}
