"""What follows a layer directly: the norms and activations that read its output and nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

POINTWISE = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU),
    *(nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.ELU, nn.Tanh, nn.Sigmoid),
)


@torch.no_grad()
def find_tails(model: nn.Module, layers: Mapping[str, nn.Module], run: Any) -> dict[str, tuple[nn.Module, ...]]:
    """Returns per layer the modules that its output passes through, told by running the model once.

    Args:
        model: In eval mode.
        layers: The layers by name.
        run: Computes the model on one batch.
    """
    names = {id(layer): name for name, layer in layers.items()}
    tails: dict[str, list[nn.Module]] = {name: [] for name in layers}
    last: dict[str, weakref.ref[Tensor]] = {}  # an identity alone might be used again by another tensor

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if id(module) in names:
            last.setdefault(names[id(module)], weakref.ref(output))
        elif isinstance(module, POINTWISE) and args:
            for name, tensor in last.items():
                if args[0] is tensor():
                    tails[name].append(module)
                    last[name] = weakref.ref(output)
                    return

    seen: set[int] = set()
    handles = []
    for module in model.modules():
        # A norm with an activation inside (timm) is one module; its parts would be found twice.
        if id(module) in seen:
            continue
        if isinstance(module, POINTWISE):
            seen |= {id(part) for part in module.modules()}
        handles.append(module.register_forward_hook(after))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: tuple(found) for name, found in tails.items()}
