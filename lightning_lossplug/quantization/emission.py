"""What happens to a layer's output before it leaves: an activation, and codes for the next layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Emission(NamedTuple):
    """What a layer's output becomes before it leaves: an activation, then the codes of the next layer.

    Args:
        act: Name of oneDNN's activation (``none``, ``relu``, ``hardtanh``, ``hardswish``, ``swish`` or ``gelu``).
        arguments: Its numbers.
        algorithm: Its variant (``tanh`` or ``none`` for ``gelu``).
        scale: Step of the next layer's input; None leaves the output in floating point.
        zero: Byte of the value 0 there.
        bounds: Least and largest byte there.
    """

    act: str = "none"
    arguments: tuple[float, ...] = ()
    algorithm: str = ""
    scale: float | None = None
    zero: int = 0
    bounds: tuple[int, int] = (0, 255)


PLAIN = Emission()


def emitted(y: Tensor, emission: Emission) -> Tensor:
    """Returns what becomes of an output, by PyTorch's operators: its dtype, or uint8 where the emission has a step.

    Args:
        y: Any shape.
        emission: What happens to it.
    """
    kind, pairs = emission.act, {"relu": F.relu, "hardswish": F.hardswish, "swish": F.silu}
    if kind == "hardtanh":
        y = y.clamp(*emission.arguments)
    elif kind == "gelu":
        y = F.gelu(y, approximate=emission.algorithm)
    elif kind != "none":
        y = pairs[kind](y)
    if emission.scale is None:
        return y
    return (y.float() / emission.scale).round_().add_(emission.zero).clamp_(*emission.bounds).to(torch.uint8)


# Activations that the kernels compute behind a product, as modules and as functions.
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Emission]] = {
    nn.ReLU: lambda act: Emission("relu"),
    nn.ReLU6: lambda act: Emission("hardtanh", (0.0, 6.0)),
    nn.Hardswish: lambda act: Emission("hardswish"),
    nn.SiLU: lambda act: Emission("swish"),
    nn.GELU: lambda act: Emission("gelu", (), act.approximate),
}
FUNCTIONS: dict[Any, Callable[..., Emission]] = {
    F.relu: lambda inplace=False: Emission("relu"),
    F.silu: lambda inplace=False: Emission("swish"),
    F.gelu: lambda approximate="none": Emission("gelu", (), approximate),
}
