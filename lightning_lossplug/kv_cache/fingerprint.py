"""Telling whether factors belong to a model: a few numbers per layer that survive a change of dtype or of form."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import AttentionBlock

_SAMPLE = 65536  # entries of each weight, which tell models apart as well as all of them
_TOLERANCE = 0.05  # bfloat16 rounding moves a number by about 0.002, other weights by about 1


@torch.no_grad()
def fingerprint(model: nn.Module, blocks: dict[int, AttentionBlock]) -> dict[str, Any]:
    r"""Returns the class of a model and, per block, the direction of its weights.

    A number is :math:`\langle w, u\rangle / \|w\|` for the first entries w of the block's weights and a fixed vector u
    of variance 1. The weights are those that the block computes with: masked and quantised where they are in training,
    and what the codes stand for in a model of integers, so that factors of a run serve what leaves it.
    """
    numbers = {}
    for index, block in sorted(blocks.items()):
        dot, square = 0.0, 0.0
        for _, weight in _matrices(block.module):
            flat = weight.detach().flatten()[:_SAMPLE].cpu().double()
            dot += float(flat @ _direction()[: len(flat)])
            square += float(flat @ flat)
        numbers[str(index)] = round(dot / max(square, 1e-300) ** 0.5, 6)
    return {"model": type(model).__name__, "layers": numbers}


def _matrices(module: nn.Module) -> list[tuple[str, Tensor]]:
    found: dict[str, Tensor] = {}
    for path, layer in module.named_modules():
        if "_transforms" in path:  # what techniques keep beside a weight is none
            continue
        names = (name for name in (*layer._parameters, "weight") if not name.endswith(("_scale", "_zero_point")))
        held = [name for name in names if isinstance(getattr(layer, name, None), Tensor)]
        found |= {f"{path}.{name}": value for name in held if (value := getattr(layer, name)).ndim >= 2}
    return sorted(found.items())


@cache
def _direction() -> Tensor:
    # Knuth's multiplicative hash: the same on every platform, unlike a random generator
    hashed = (torch.arange(1, _SAMPLE + 1) * 2654435761) % 4294967296
    return (hashed.double() / 2147483648 - 1).mul_(3**0.5)


def check_fingerprint(saved: dict[str, Any], model: nn.Module, blocks: dict[int, AttentionBlock]) -> None:
    """Checks that factors were made for these weights.

    Raises:
        LossplugError: Other layers, or weights that differ by more than a cast or a light fine-tuning explains.
    """
    now = fingerprint(model, blocks)
    remedy = "Calibrate this model, or load the one the factors were made for"
    if set(saved["layers"]) != set(now["layers"]):
        raise LossplugError(
            f"the factors are of a model with {len(saved['layers'])} layers to shrink, this one has "
            f"{len(now['layers'])}",
            where="KV factors",
            remedy=remedy,
        )
    wrong = [index for index, number in now["layers"].items() if abs(number - saved["layers"][index]) > _TOLERANCE]
    if wrong:
        raise LossplugError(
            f"the factors are of another model: {len(wrong)} of {len(now['layers'])} attention blocks have other "
            "weights",
            where="KV factors",
            remedy=remedy,
        )
