"""Quantised linear weights as torchao tensors, with the codes and scales of training."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.quantization.integer import quantizer_of, weight_codes
from lightning_lossplug.surgery.plug import fold, plain_class, plugged_layers


@torch.no_grad()
def torchao_model(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Returns a copy whose quantised linear weights are torchao's ``IntxUnpackedToInt8Tensor``.

    That is what torchao's own weight-only configurations make of a layer, so ``torch.export``, ``torch.save`` and the
    back ends that know torchao take it from there; here the codes are those of training. A code takes a byte. Inputs
    stay in floating point.

    Args:
        model: A module with plugged layers; it stays as it is.

    Returns:
        The model, in eval mode, and ``{path: reason}`` for quantised layers that were folded instead.

    Raises:
        LossplugError: torchao is not installed, or no layer could be converted.
    """
    require("torchao", "torchao", "torchao tensors")
    from torchao.quantization import IntxUnpackedToInt8Tensor

    made: dict[str, Any] = {}
    left: dict[str, str] = {}
    for name, layer in plugged_layers(model):
        weight = quantizer_of(layer)
        if plain_class(layer) is not nn.Linear or weight is None:
            left[name] = f"a {plain_class(layer).__name__} has no such weight"
            continue
        weight.check_ready()
        if not weight.has_codes or weight.layout.axis != 0:
            left[name] = f"{weight.name} has no integer codes per row"
            continue
        coded = weight_codes(layer, weight)
        if int(coded.codes.min()) < -128 or int(coded.codes.max()) > 127:
            left[name] = "its codes are wider than int8"
            continue
        rows, columns = coded.codes.shape
        group = weight.layout.group_size or columns
        scale = coded.scale.reshape(-1, columns // group if weight.layout.group_size else 1).expand(rows, -1)
        zero = torch.zeros_like(scale) if coded.zero_point is None else coded.zero_point.reshape(scale.shape)
        need = max(-int(coded.codes.min()) - 1, int(coded.codes.max()), 1).bit_length() + 1
        bits = max(need, math.ceil(weight.bits))  # type: ignore[arg-type]
        made[name] = IntxUnpackedToInt8Tensor(
            coded.codes.to(torch.int8),
            scale.contiguous().to(layer.weight.dtype),
            zero.contiguous().to(layer.weight.dtype),
            getattr(torch, f"int{bits}"),
            (1, group),
            layer.weight.dtype,
            None,
        )
    if not made:
        where, why = next(iter(left.items()), ("the model", "it has no quantised layer"))
        raise LossplugError(f"no weight can be a torchao tensor: {why}", where=where)
    twin = fold(copy.deepcopy(model), inplace=True)
    for name, value in made.items():
        twin.get_submodule(name).weight = nn.Parameter(value, requires_grad=False)
    return twin.eval(), left
