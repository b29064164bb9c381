"""Which layers feed which: the graph of a module's forward, or of its parts where the whole can't be traced."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_lossplug.surgery.plug import WeightTransform


@dataclass(frozen=True)
class Region:
    """The traced forward of one module.

    Args:
        path: Its path in the model.
        module: The module.
        graph: Its graph; calls of leaves are ``call_module`` nodes.
        calls: How often each leaf is called, by identity.
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    calls: Counter[int]

    def layer(self, node: Any) -> nn.Module | None:
        """Returns the leaf that a node calls, if this is its only call."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        found = self.module.get_submodule(str(node.target))
        return found if self.calls[id(found)] == 1 else None

    def full(self, node: fx.Node) -> str:
        """Returns the path of the leaf in the model."""
        return f"{self.path}.{node.target}" if self.path else str(node.target)


class _Tracer(fx.Tracer):
    def __init__(self, leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._leaf = leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m) or isinstance(m, WeightTransform) or super().is_leaf_module(m, module_qualified_name)


def traced_regions(model: nn.Module, leaf: Callable[[nn.Module], bool]) -> Iterator[Region]:
    """Yields the largest modules whose forward can be traced, called with their required arguments alone.

    Args:
        model: Any module; a forward that fails or depends on values is traced in its parts. It stays as it is.
        leaf: Tells what is looked for: these modules are not looked into (those of ``torch.nn`` never are), and modules
            without any are left out.
    """
    shared = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    yield from _regions("", model, leaf, {key for key, count in shared.items() if count > 1})


def _regions(path: str, module: nn.Module, leaf: Callable[[nn.Module], bool], shared: set[int]) -> Iterator[Region]:
    if leaf(module) or not any(leaf(m) for m in module.modules()):
        return
    graph = None if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else _trace(module, leaf)
    if graph is not None:
        calls = Counter(id(module.get_submodule(str(n.target))) for n in graph.nodes if n.op == "call_module")
        calls.update(shared)  # a module with two paths may be called from elsewhere
        yield Region(path, module, graph, calls)
        return
    for name, child in module.named_children():
        yield from _regions(f"{path}.{name}" if path else name, child, leaf, shared)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Takes back what a forward that keeps its last values keeps."""
    kept = [(m, vars(m).copy(), m._buffers.copy()) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes, buffers in kept:
            vars(m).clear()
            vars(m).update(attributes)
            m._buffers.clear()
            m._buffers.update(buffers)


def _trace(module: nn.Module, leaf: Callable[[nn.Module], bool]) -> fx.Graph | None:
    with undisturbed(module):  # or it would keep symbols
        try:
            parameters = inspect.signature(module.forward).parameters.values()
            fixed = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
            with torch.no_grad():
                return _Tracer(leaf).trace(module, concrete_args=fixed)
        except Exception:  # whatever a foreign forward does with a symbol
            return None
