"""Integer layers that compute the activation behind them and hand bytes to the next layer."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import fx, nn

from lightning_lossplug.quantization.emission import ACTIVATIONS, PLAIN, Emission, emitted
from lightning_lossplug.quantization.gated_layer import GatedLayer
from lightning_lossplug.quantization.integer_layer import IntegerLayer
from lightning_lossplug.surgery.fold_norm import PASSES
from lightning_lossplug.surgery.trace import Region, traced_regions


@torch.no_grad()
def fuse_layers(model: nn.Module) -> int:
    """Fuses the integer layers of a model in place, where its forward can be traced.

    ``layer -> activation`` becomes one operator; ``layer -> activation -> layers that quantise alike`` also passes
    bytes instead of floating-point values. A value between two codes may then go to the other one. Every fused layer
    is tried on numbers first and stays as it was if it is off by more than a code.

    Args:
        model: With :class:`IntegerLayer` modules, in evaluation.

    Returns:
        How many layers were fused.
    """
    fused = 0
    for region in traced_regions(model, lambda m: isinstance(m, (IntegerLayer, GatedLayer))):
        for node in region.graph.nodes:
            layer = region.layer(node)
            if isinstance(layer, IntegerLayer) and layer.backend != "reference" and layer.emission == PLAIN:
                fused += _fuse(region, node, layer)
    return fused


def _fuse(region: Region, node: fx.Node, layer: IntegerLayer) -> bool:
    node, act = skip_passes(region, node), None
    if len(node.users) != 1 or (layer.dynamic and layer.function is None):
        return False
    found = next(iter(node.users))
    kind = ACTIVATIONS.get(type(region.layer(found)))  # type: ignore[arg-type]
    if kind is not None:
        act, node = found, skip_passes(region, found)
    plain = PLAIN if kind is None else kind(region.layer(act))
    as_bytes = None if layer.dynamic else _to_bytes(layer, plain, _readers(region, node))
    for emission in (as_bytes, plain):
        if emission is not None and emission != PLAIN and _works(layer, emission):
            layer.emission = emission
            if act is not None:
                parent, _, child = str(act.target).rpartition(".")
                setattr(region.module.get_submodule(parent), child, nn.Identity())
            return True
    return False


def skip_passes(region: Region, node: fx.Node) -> fx.Node:
    """Returns the last node behind one, over what does nothing in evaluation and nobody else reads."""
    while len(node.users) == 1 and isinstance(region.layer(next(iter(node.users))), PASSES):
        node = next(iter(node.users))
    return node


def _readers(region: Region, node: fx.Node) -> list[IntegerLayer] | None:
    layers = [region.layer(user) for user in node.users]
    return layers if layers and all(_is_fast(m) for m in layers) else None  # type: ignore[return-value]


def _is_fast(layer: object) -> TypeGuard[IntegerLayer]:
    # Steps that are known only when an input is there can't be built into the product before.
    return isinstance(layer, IntegerLayer) and layer.backend != "reference" and not layer.dynamic


def _to_bytes(layer: IntegerLayer, plain: Emission, readers: list[IntegerLayer] | None) -> Emission | None:
    if readers is None:
        return None
    grids = {m.taken_as for m in readers}
    if len(grids) != 1:
        return None
    (grid,) = grids
    (low, high), scale, zero = grid.bounds, grid.scale, grid.zero
    assert scale is not None
    if grid.bounds == PLAIN.bounds or layer.backend == "native":
        return grid._replace(act=plain.act, arguments=plain.arguments, algorithm=plain.algorithm)
    # oneDNN saturates at a byte's ends only, but a ReLU can be cut where the codes end.
    if plain.act in ("relu", "hardtanh") and zero == low == 0:
        top = min([high * scale, *plain.arguments[1:]])
        return Emission("hardtanh", (0.0, top), "", scale, 0)
    return None


def _works(layer: IntegerLayer, emission: Emission) -> bool:
    try:
        plain, got = (layer.tried(out).float() for out in (PLAIN, emission))
    except RuntimeError:  # an activation that this processor's kernels don't know
        return False
    finally:
        layer._packed.clear()
    want = emitted(plain, emission).float()
    if emission.scale is None:
        return bool((got - want).abs().max() <= 1e-5 * want.abs().max().clamp_min(1e-30))
    return bool((got - want).abs().max() <= 1)
