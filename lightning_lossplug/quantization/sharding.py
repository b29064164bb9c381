"""Scales next to sharded weights (FSDP2), which shards them like every other parameter.

A product reads whole plain scales, gathered for its module, and their gradients are averaged as those of weights are.
What is left to do is to set them: a value that a forward pass writes goes into the gathered copy, which is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.surgery.shards import full, is_sharded, local, shard_like


@torch.no_grad()
def keep_new_scales(model: nn.Module, quantizers: Iterable[Quantizer]) -> None:
    """Writes what a forward pass has just set into the shards, before the backward pass gathers them again.

    Args:
        model: The model, which may hold FSDP2's modules.
        quantizers: Its quantisers; values are the same on every rank.
    """
    fresh = [quantizer for quantizer in quantizers if quantizer.just_set]
    if not fresh:
        return
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    for quantizer in fresh:
        for name, value in quantizer.just_set.items():
            parameter = quantizer.get_parameter(name)
            if is_sharded(parameter):
                local(parameter).copy_(shard_like(value, parameter))
        quantizer.just_set = {}


@torch.no_grad()
def set_from_weight(quantizer: Quantizer, weight: Tensor) -> None:
    """Sets the scales of a weight, which may be sharded; then all ranks have to call this.

    Raises:
        LossplugError: NaN or infinite entries.
    """
    if not is_sharded(weight):
        quantizer.initialize(weight)
        return
    kept = dict(quantizer._parameters)
    for name, parameter in kept.items():
        if parameter is not None:
            quantizer._parameters[name] = nn.Parameter(full(parameter).clone(), parameter.requires_grad)
    try:
        quantizer.initialize(full(weight))
        for name, parameter in kept.items():
            if parameter is not None:
                value = quantizer.get_parameter(name).detach()
                local(parameter).copy_(shard_like(value, parameter) if is_sharded(parameter) else value)
    finally:
        quantizer._parameters.update(kept)
