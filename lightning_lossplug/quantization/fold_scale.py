"""Layer scales of transformers that disappear into the integer layer before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lossplug.quantization.emission import PLAIN
from lightning_lossplug.quantization.integer_fuse import skip_passes
from lightning_lossplug.quantization.integer_layer import IntegerLayer
from lightning_lossplug.surgery.trace import traced_regions


@torch.no_grad()
def fold_layer_scales(model: nn.Module) -> int:
    """Folds modules that multiply each channel by a number (timm's ``LayerScale``) into the integer layer before them.

    The layer's scales and bias take the factors in, in place; its codes stay. What follows what is read from a trace.

    Args:
        model: With :class:`IntegerLayer` modules, in evaluation.

    Returns:
        How many were folded; each leaves an ``nn.Identity``.
    """
    found, count = {m: factors for m in model.modules() if (factors := _factors(m)) is not None}, 0
    if not found:
        return count
    for region in traced_regions(model, lambda m: isinstance(m, IntegerLayer) or m in found):
        for node in region.graph.nodes:
            layer = region.layer(node)
            if not isinstance(layer, IntegerLayer) or layer.emission != PLAIN:
                continue
            node = skip_passes(region, node)
            after = next(iter(node.users)) if len(node.users) == 1 else None
            factors = found.get(region.layer(after))  # type: ignore[arg-type]
            if factors is None or factors.shape != layer.weight_scale.shape:
                continue
            layer.fold_affine(factors.float(), torch.zeros_like(factors, dtype=torch.float32))
            parent, _, child = str(after.target).rpartition(".")  # type: ignore[union-attr]
            setattr(region.module.get_submodule(parent), child, nn.Identity())
            count += 1
    return count


def _factors(module: nn.Module) -> Tensor | None:
    """The numbers a module multiplies channels by, if that is all it does."""
    if not type(module).__name__.endswith("LayerScale") or module._forward_hooks or module._forward_pre_hooks:
        return None
    held = list(module.parameters())
    if len(held) != 1 or held[0].ndim != 1:
        return None
    x = torch.randn(2, 3, len(held[0]), generator=torch.Generator().manual_seed(0)).to(held[0])
    return held[0].detach() if torch.equal(module(x), x * held[0]) else None
