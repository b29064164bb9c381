"""Inputs whose step is measured when they arrive: one per token of a linear layer, one per sample of a convolution."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import Role, check_bits
from lightning_lossplug.registry import register


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        return (x / step).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def dynamic_step(x: Tensor, bits: int = 8, axis: int = -1) -> Tensor:
    """Returns the largest magnitude over the axes from ``axis`` on, over ``2^(bits - 1) - 1``; 1 where all is 0.

    Args:
        x: Any shape.
        bits: 2 to 8.
        axis: The first of the axes that share a step; they are kept with length one.
    """
    dims = list(range(axis % x.ndim, x.ndim))
    step = torch.linalg.vector_norm(x.detach(), float("inf"), dim=dims, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, step, torch.ones_like(step))


def dynamic(x: Tensor, bits: int = 8, axis: int = -1) -> Tensor:
    r"""Quantises every token by itself: :math:`\hat x = s\,\mathrm{round}(x/s)`, :math:`s = \max|x| / (2^{b-1} - 1)`.

    Nothing is clipped; the gradient is g, the step being a constant.

    Args:
        x: Any shape.
        bits: 2 to 8.
        axis: The first of the axes that share a step: -1 is one step per token.

    Raises:
        LossplugError: Bits out of range.

    Source: token-wise quantisation of Yao et al., ZeroQuant, arXiv 2206.01861, section 4.1.
    """
    bits = check_bits("dynamic", bits, 2, 8)
    return _Round.apply(x, dynamic_step(x, bits, axis))


@register(
    "quantizer",
    "dynamic",
    family="observer",
    paper="ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
    arxiv="2206.01861",
    roles=("activation",),
    blocks=True,
)
class Dynamic(Quantizer):
    """Inputs quantised by their own largest magnitude, as they arrive: nothing to calibrate, learn or store.

    For language models, whose tokens differ in magnitude by orders: one step for all of them leaves most tokens a few
    codes. Integer layers take the steps along, so a product costs a pass over its input and one over its output more
    than with a static step; convolutions, which mix places, have one step per sample.

    Args:
        bits: 2 to 8.
        axis: The first of the axes that share a step: -1 for linear layers (a step per token), 1 for convolutions.
        role: ``activation``.

    Raises:
        LossplugError: Bits out of range.
    """

    name: ClassVar[str] = "dynamic"

    def __init__(self, bits: int = 8, axis: int = -1, role: Role = "activation") -> None:
        super().__init__(role=role)
        self.bits, self.axis = check_bits(self.name, bits, 2, 8), axis

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and largest code."""
        top = 2 ** (self.bits - 1) - 1
        return -top, top

    @property
    def ready(self) -> bool:
        """True: there is nothing to set."""
        return True

    def due(self) -> bool:
        """False: there is nothing to set."""
        return False

    def snap(self, x: Tensor) -> Tensor:
        """Returns the quantised values."""
        return dynamic(x, self.bits, self.axis)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the steps of these values."""
        return dynamic_step(x, self.bits, self.axis), None
