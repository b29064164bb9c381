"""What a module computes by C++ functions alone, written down once and run from then on without Python between them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.native import load_with
from lightning_lossplug.surgery.attention import Listening, unheard

SOURCE = Path(__file__).with_name("program.cpp")
INPUT, OUTPUT, MEMORY = 0, 1, 2  # what an address counts from
ALIGNED = 64
# Functions of PyTorch that tell about a tensor without reading it, and those that may return a view of it.
LOOKS = {
    "shape",
    "size",
    "dim",
    "ndim",
    "dtype",
    "device",
    "numel",
    "stride",
    "is_contiguous",
    "requires_grad",
    "__len__",
}
LOOKS |= {"is_cuda", "layout", "is_floating_point", "element_size", "is_sparse", "is_nested", "is_quantized"}
VIEWS = {"view", "reshape", "permute", "transpose", "unbind", "chunk", "split", "select", "__getitem__", "unsqueeze"}
VIEWS |= {"squeeze", "flatten", "unflatten", "contiguous", "expand", "movedim", "swapaxes", "mT", "T", "dropout"}
ADDS = {"add", "__add__", "__radd__"}


class _Address(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("at", "base", "offset")]


class _Step(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("at", ctypes.c_int64)]


class _Program(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("size", "addresses", "steps", "room")),
        *((name, ctypes.c_void_p) for name in ("arguments", "address", "step")),
    ]


@cache
def program_library() -> ctypes.CDLL | str:
    """Returns the compiled function, or in words why there is none."""
    library = load_with(SOURCE, _Program, "lossplug_program_bytes", "its arguments have another layout")
    if not isinstance(library, str):
        library.lossplug_run.argtypes = [ctypes.c_void_p] * 4
        library.lossplug_run.restype = None
    return library


class _Here(threading.local):
    tape: Tape | None = None


_here = _Here()
_changes = 0


def changed() -> None:
    """Says that a layer which may have been written down has other numbers: programs made before are not used again."""
    global _changes
    _changes += 1


def changes() -> int:
    """Returns how often :func:`changed` was called."""
    return _changes


def running_tape() -> Tape | None:
    """Returns the tape that runs in this thread; whoever calls a C++ function tells it by :meth:`Tape.add`."""
    return _here.tape


@dataclass
class _Noted:
    function: int
    arguments: ctypes.Structure
    pointers: list[tuple[str, int, int]]  # name, buffer, bytes from its beginning
    plus: str | None


@dataclass
class _Buffer:
    size: int
    held: Tensor
    since: int
    until: int = field(default=-1)


class Tape(Listening):
    """Listens to a forward and keeps what has to be called to compute it again for an input of the same kind.

    Everything must be known functions, views of what they write, and sums with what the last of them wrote; anything
    else ends up in :attr:`refused`. The forward itself runs as always.

    Args:
        x: Its input, contiguous.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.refused = "" if x.is_contiguous() else "the input is not contiguous"
        self.steps: list[_Noted] = []
        self.buffers = [_Buffer(x.numel() * x.element_size(), x, -1)]
        self.start = x.data_ptr() - _storage(x)
        self.known = {_storage(x): INPUT}
        self.holds: list[object] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the function, and sees whether it can be written down."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
        # Dropout in evaluation returns its input; in training it may do so, too, having changed it.
        dropped = name == "dropout" and (args[2] if len(args) > 2 else kwargs.get("training", True))
        view = name in VIEWS and not dropped and all(self._find(t) is not None for t in _tensors(out))
        if name in ADDS and not kwargs:
            self._sum(args, out)
        elif name not in LOOKS and not view:
            self.refuse(f"it calls {name}")
        return out

    def refuse(self, why: str) -> None:
        """Keeps the first reason why this can't be written down."""
        self.refused = self.refused or why

    def add(
        self,
        function: Any,
        arguments: ctypes.Structure,
        reads: dict[str, Tensor],
        writes: dict[str, Tensor],
        holds: object,
        plus: str | None = None,
    ) -> None:
        """Writes down a function that was just called.

        Args:
            function: Of a library; it takes a pointer to its arguments.
            arguments: As given to it.
            reads: The tensors that are read, by the names of the pointers into them.
            writes: The tensors that are written, likewise.
            holds: An object that keeps everything else alive that the arguments point to.
            plus: A pointer to what the function would add to the one tensor it writes, which has its size and dtype.
        """
        here, pointers = len(self.steps), []
        for tensor in {_storage(t): t for t in writes.values()}.values():
            self.known[_storage(tensor)] = len(self.buffers)
            self.buffers.append(_Buffer(tensor.untyped_storage().nbytes(), tensor, here, here))
        for name, tensor in (reads | writes).items():
            found = self._find(tensor)
            if found is None:
                self.refuse("a function reads what no other wrote")
                return
            self.buffers[found].until = here
            pointers.append((name, found, getattr(arguments, name) - self._begin(found)))
        copied = type(arguments).from_buffer_copy(arguments)
        self.steps.append(_Noted(ctypes.cast(function, ctypes.c_void_p).value or 0, copied, pointers, plus))
        self.holds.append(holds)

    def _begin(self, buffer: int) -> int:
        held = self.buffers[buffer].held
        return _storage(held) + (self.start if buffer == INPUT else 0)

    def _find(self, tensor: Tensor) -> int | None:
        return self.known.get(_storage(tensor))

    def _sum(self, args: tuple[Any, ...], out: Tensor) -> None:
        last = self.steps[-1] if self.steps else None
        if last is None or last.plus is None or len(args) != 2 or not all(isinstance(t, Tensor) for t in args):
            self.refuse("it adds")
            return
        written = last.pointers[-1][1]
        for mine, other in (args, args[::-1]):
            buffer, from_there = self.buffers[written], self._find(other)
            whole = mine.is_contiguous() and mine.numel() * mine.element_size() == buffer.size
            if self._find(mine) != written or not whole or from_there in (None, written):
                continue
            if mine.shape != other.shape or mine.dtype != other.dtype or not other.is_contiguous():
                continue
            # The last function adds it itself; what it would have written alone is no longer there.
            assert from_there is not None
            del self.known[_storage(buffer.held)]
            self.known[_storage(out)], buffer.held = written, out
            self.buffers[from_there].until = len(self.steps) - 1
            last.pointers.append((last.plus, from_there, other.data_ptr() - self._begin(from_there)))
            last.plus = None
            return
        self.refuse("it adds what the last function did not write")

    def program(self, y: Tensor) -> Program | str:
        """Returns what was written down, or in words why it can't be run alone.

        Args:
            y: What the forward returned.
        """
        result = self._find(y)
        library = program_library()
        if isinstance(library, str):
            return library
        if self.refused or result in (None, INPUT):
            return self.refused or "what it returns is not what a function wrote"
        assert result is not None
        if not y.is_contiguous() or y.numel() * y.element_size() != self.buffers[result].size:
            return "what it returns is a part of what a function wrote"
        return Program(library, self, result, y)


class Program:
    """Functions to be called one after the other.

    Args:
        library: With the function that calls them.
        tape: What to call.
        result: The buffer that is returned.
        y: What was returned when it was written down.
    """

    def __init__(self, library: ctypes.CDLL, tape: Tape, result: int, y: Tensor) -> None:
        self.shape, self.dtype = y.shape, y.dtype
        places, room = _places(tape.buffers, result)
        places |= {INPUT: (INPUT, 0), result: (OUTPUT, 0)}
        steps, addresses, arguments = [], [], bytearray()
        for step in tape.steps:
            at = len(arguments)
            steps.append(_Step(step.function, at))
            for name, buffer, offset in step.pointers:
                base, start = places[buffer]
                addresses.append(_Address(at + getattr(type(step.arguments), name).offset, base, start + offset))
            arguments += bytes(step.arguments)
            arguments += bytes(-len(arguments) % ALIGNED)
        self._held = (
            (ctypes.c_uint8 * len(arguments)).from_buffer_copy(arguments),
            (_Address * len(addresses))(*addresses),
            (_Step * len(steps))(*steps),
        )
        self._alive = tape.holds
        pointers = (ctypes.addressof(part) for part in self._held)
        self._program = _Program(len(arguments), len(addresses), len(steps), room, *pointers)
        self._address = ctypes.addressof(self._program)
        self._memory = room + len(arguments)
        self._run = library.lossplug_run

    def __len__(self) -> int:
        return int(self._program.steps)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns what the module returns for ``x``: contiguous, of the kind that was written down."""
        y = torch.empty(self.shape, dtype=self.dtype)
        memory = torch.empty(self._memory, dtype=torch.uint8)
        self._run(self._address, x.data_ptr(), y.data_ptr(), memory.data_ptr())
        return y


def _places(buffers: list[_Buffer], result: int) -> tuple[dict[int, tuple[int, int]], int]:
    """Returns where every buffer lies in one piece of memory, and its size; what is no longer read makes room."""
    live: list[tuple[int, int, int]] = []  # begin, end, last step
    places, room = {}, 0
    for index, buffer in enumerate(buffers):
        if index in (INPUT, result):
            continue
        live = sorted(part for part in live if part[2] >= buffer.since)
        begin = 0
        for start, end, _ in live:
            if start - begin >= buffer.size:
                break
            begin = max(begin, end)
        end = -(-(begin + buffer.size) // ALIGNED) * ALIGNED
        live.append((begin, end, buffer.until))
        places[index] = (MEMORY, begin)
        room = max(room, end)
    return places, room


@contextmanager
def taped(x: Tensor) -> Iterator[Tape]:
    """Writes down what is computed within, from an input."""
    tape = Tape(x)
    _here.tape = tape
    try:
        with tape:
            yield tape
    finally:
        _here.tape = None


def _storage(tensor: Tensor) -> int:
    with unheard():
        return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for one in value for t in _tensors(one)] if isinstance(value, (list, tuple)) else []
