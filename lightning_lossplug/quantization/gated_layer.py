"""Gated feed-forward layers in integers, whose product goes to the last layer as bytes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_lossplug.native import reachable
from lightning_lossplug.quantization.emission import ACTIVATIONS, FUNCTIONS, PLAIN, Emission, emitted
from lightning_lossplug.quantization.integer_layer import IntegerLayer
from lightning_lossplug.surgery.attention import unheard
from lightning_lossplug.surgery.fold_norm import PASSES
from lightning_lossplug.surgery.trace import Region, traced_regions


class GatedLayer(nn.Module):
    """``down(act(gate(x)) * up(x))``, as in Llama, with no pass for the activation or the product.

    Args:
        layers: The three integer layers by the names they had; they keep them.
        act: The activation of the gate.
        order: Names of gate, up and down.
    """

    def __init__(self, layers: dict[str, IntegerLayer], act: Emission, order: tuple[str, str, str]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.act, self.order = act, order

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output, in the dtype of ``x``."""
        gate, up, down = (self._modules[name] for name in self.order)
        assert isinstance(gate, IntegerLayer)
        assert isinstance(up, IntegerLayer)
        assert isinstance(down, IntegerLayer)
        if not reachable(x) or gate.function is None or up.function is None or down.function is None:
            y: Tensor = down(emitted(gate(x), self.act) * up(x))
            return y
        with unheard():
            given = x.contiguous() if x.dtype in (torch.float32, torch.bfloat16) else x.float().contiguous()
            factor = gate.function(given, torch.float32, self.act)
            out = PLAIN if down.dynamic else down.taken_as
            y = down(up.function(given, given.dtype, out, factor))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """The activation."""
        return self.act.act


@torch.no_grad()
def fuse_gates(model: nn.Module) -> int:
    """Replaces gated feed-forward modules by :class:`GatedLayer`, in place.

    A module is one if its whole forward is ``down(act(gate(x)) * up(x))`` of integer layers that run in the function of
    our own. Each is tried on numbers first.

    Returns:
        How many were replaced.
    """
    count = 0
    for path, module in list(model.named_modules()):
        layers = [m for m in module.children() if isinstance(m, IntegerLayer)]
        if not path or len(layers) != 3 or any(m.function is None or m.emission != PLAIN for m in layers):
            continue
        made = next(filter(None, map(_gated, traced_regions(module, lambda m: isinstance(m, IntegerLayer)))), None)
        if made is not None and _agrees(module, made):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, made.eval())
            count += 1
    return count


def _gated(region: Region) -> GatedLayer | None:
    inputs = [node for node in region.graph.nodes if node.op == "placeholder" and node.users]
    if region.path or len(inputs) != 1:
        return None
    down = _back(region, next(node for node in region.graph.nodes if node.op == "output").args[0])
    times = _back(region, down.args[0]) if _is_layer(region, down) else None
    if times is None or not (times.op == "call_function" and times.target in (operator.mul, torch.mul)):
        return None
    for first, second in (times.args, times.args[::-1]):
        found = _activation(region, _back(region, first))
        up = _back(region, second)
        if found is None or not _is_layer(region, up) or up.args != (inputs[0],):
            continue
        act, gate = found
        if _is_layer(region, gate) and gate.args == (inputs[0],):
            order = (str(gate.target), str(up.target), str(down.target))
            if not any("." in name for name in order):
                layers = {n: m for n, m in region.module.named_children() if n in order}
                return GatedLayer(layers, act, order)  # type: ignore[arg-type]
    return None


def _is_layer(region: Region, node: Any) -> bool:
    return isinstance(region.layer(node), IntegerLayer)


def _back(region: Region, node: Any) -> Any:
    # Back over what does nothing in evaluation.
    while isinstance(node, fx.Node) and node.op == "call_module":
        if not isinstance(region.module.get_submodule(str(node.target)), PASSES):
            break
        node = node.args[0]
    return node


def _activation(region: Region, node: Any) -> tuple[Emission, fx.Node] | None:
    if not isinstance(node, fx.Node) or not node.args:
        return None
    kind = ACTIVATIONS.get(type(region.layer(node)))  # type: ignore[arg-type]
    if kind is not None:
        return kind(region.layer(node)), _back(region, node.args[0])
    function = FUNCTIONS.get(node.target) if node.op == "call_function" else None
    return None if function is None else (function(*node.args[1:], **node.kwargs), _back(region, node.args[0]))


def _agrees(module: nn.Module, made: GatedLayer) -> bool:
    gate = made._modules[made.order[0]]
    assert isinstance(gate, IntegerLayer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, gate.codes.shape[1], generator=generator) * (gate.input_scale * 50 if not gate.dynamic else 1)
    want, got = module(x), made(x)
    # A value between two codes of the last layer's input may go to the other one.
    return bool((got - want).abs().max() <= 0.02 * want.abs().max().clamp_min(1e-30))
