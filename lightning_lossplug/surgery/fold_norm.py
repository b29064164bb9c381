"""Batch norms that disappear into the convolution or linear layer before them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lossplug.surgery.plug import PluggedLayer
from lightning_lossplug.surgery.trace import Region, traced_regions

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PASSES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # what does nothing in evaluation


@torch.no_grad()
def fold_batch_norm(model: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, dict[str, str]]:
    r"""Folds every batch norm that follows a product into it, as the two compute in evaluation.

    With running mean m and variance v, :math:`W' = W\gamma/\sqrt{v+\epsilon}` and
    :math:`b' = (b - m)\gamma/\sqrt{v+\epsilon} + \beta`. What follows what is read from a trace of the forward
    (:mod:`torch.fx`), of its parts where the whole can't be traced. A norm leaves an ``nn.Identity``; one with an
    activation of its own (timm's ``BatchNormAct2d``) leaves that. Folded models are for evaluation, or for
    quantisation-aware training without batch statistics.

    Args:
        model: Any module; the arithmetic is in its dtype, at least float32.
        inplace: Fold the model itself; by default a copy is folded.

    Returns:
        The model, and ``{path: reason}`` for the batch norms that stay.
    """
    model = model if inplace else copy.deepcopy(model)
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    left = {name: "nothing it could be folded into comes before it" for name, m in _norms(model)}
    for region in traced_regions(model, _is_leaf):
        for node in region.graph.nodes:
            norm = region.layer(node)
            if not isinstance(norm, _BatchNorm):
                continue
            reason = _fold(region, node, norm, held)
            if reason is None:
                left.pop(region.full(node))
            else:
                left[region.full(node)] = reason
    return model, left


def _norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, (_BatchNorm, PluggedLayer)) or hasattr(module, "fold_affine")


def _fold(region: Region, node: fx.Node, norm: Any, held: Counter[int]) -> str | None:
    source = _before(region, node.args[0] if node.args else None)
    layer: Any = None if source is None else region.layer(source)
    if layer is None or not (isinstance(layer, PRODUCTS) or hasattr(layer, "fold_affine")):
        return "nothing it could be folded into comes before it"
    if isinstance(layer, PluggedLayer):
        return f"the weight of {region.full(source)} passes through a technique: fold that first"  # type: ignore[arg-type]
    if norm.running_mean is None:
        return "it has no running statistics"
    if any(held[id(p)] > 1 for p in layer._parameters.values() if p is not None):
        return f"the weight of {region.full(source)} is tied to another layer"  # type: ignore[arg-type]
    after = _rest(norm)
    if after is None:
        return f"{type(norm).__name__} does more than a batch norm"
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) * scale
    shift = shift if norm.bias is None else shift + norm.bias.to(wide)
    if hasattr(layer, "fold_affine"):
        layer.fold_affine(scale, shift)
    else:
        _into_product(layer, scale, shift)
    parent, _, child = str(node.target).rpartition(".")
    setattr(region.module.get_submodule(parent), child, after)
    return None


def _before(region: Region, node: Any) -> fx.Node | None:
    # Back through what does nothing; a value that someone else reads too is not the norm's alone.
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if not isinstance(region.layer(node), PASSES):
            return node
        node = node.args[0]
    return None


def _rest(norm: nn.Module) -> nn.Module | None:
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.Identity()
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    if isinstance(drop, nn.Identity) and isinstance(act, nn.Module):
        return act
    return None


def _into_product(layer: Any, scale: Tensor, shift: Tensor) -> None:
    weight, wide = layer.weight, scale.dtype
    layer.weight.copy_(weight.to(wide) * scale.reshape(-1, *[1] * (weight.ndim - 1)))
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        layer.bias.copy_(layer.bias.to(wide) * scale + shift)
