"""What a masked layer keeps for its backward pass: the bits, not the masked weight.

A product saves the weight that it read. Of a plain layer that is the Parameter itself; of a masked one it would be a
second tensor of its size until the backward pass is through. Instead a layer's forward pass runs under saved-tensor
hooks that keep a note of how the weight was made, and make it again when the backward pass asks.

Where hooks of somebody else are at work (activation checkpointing, offloading) and under ``torch.compile``, which
decides by itself what to make again, the product saves what it read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _autograd

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.sparsity.native import for_a_moment

_outer_hooks: Callable[[bool], Any] | None = getattr(_autograd, "_top_saved_tensors_default_hooks", None)


class _Read(NamedTuple):
    """One reading of an effective weight."""

    make: Callable[[Tensor], Tensor]
    weight: Tensor
    version: int


class _Note(NamedTuple):
    """What is kept of a saved view of it."""

    read: _Read
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Pass:
    """The forward pass of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        # What was read is held until the pass is over, so that no other tensor gets its memory meanwhile.
        self.reads: list[tuple[Tensor, _Read]] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack)

    def pack(self, tensor: Tensor) -> Any:
        for value, read in self.reads:
            if (
                tensor.dtype == value.dtype
                and tensor.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            ):
                return _Note(read, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor


class _Running(threading.local):
    now: _Pass | None = None


_running = _Running()


def in_pass() -> bool:
    """Tells whether a layer is in a forward pass that will keep no masked weight."""
    return not torch.compiler.is_compiling() and _running.now is not None


def note(value: Tensor, make: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    """Says that ``value``, which a layer is about to use, is ``make(weight)`` for as long as the weight stays."""
    if in_pass() and _running.now is not None:
        _running.now.reads.append((value, _Read(make, weight, weight._version)))


def _unpack(kept: Any) -> Any:
    if not isinstance(kept, _Note):
        return kept
    read = kept.read
    if read.version != read.weight._version:
        raise LossplugError(
            "a masked weight was changed between the forward and the backward pass that uses it",
            remedy="Step the optimizer after the backward pass, as for a plain layer",
        )
    with for_a_moment(), torch.no_grad():
        return read.make(read.weight).as_strided(kept.size, kept.stride, kept.offset)


def hook_layer(layer: nn.Module) -> None:
    """Registers the hooks of a layer, once."""
    if _begin not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_begin)
        layer.register_forward_hook(_end, always_call=True)


def unhook_layer(layer: nn.Module) -> None:
    """Takes them off, found by their functions since a copied layer has copied hooks."""
    for hooks, ours in ((layer._forward_pre_hooks, _begin), (layer._forward_hooks, _end)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            layer._forward_hooks_always_called.pop(key, None)


def _begin(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if _outer_hooks is None or _outer_hooks(True) is not None:
        return
    started = _Pass(layer)
    try:
        started.hooks.__enter__()
    except RuntimeError:  # torch.func forbids such hooks
        return
    _running.now = started


def _end(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or _running.now is None or _running.now.layer is not layer:
        return
    _running.now.hooks.__exit__(None, None, None)
    _running.now.reads.clear()
    _running.now = None
