"""Element-wise gradient scaling: the straight-through gradient, weighed by the rounding error of each element."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import EPS, Role, check_bits, check_range
from lightning_lossplug.registry import register


class _Ewgs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, delta: float) -> Tensor:
        xq = (x * (levels - 1)).round() / (levels - 1)
        ctx.save_for_backward(x - xq)
        ctx.delta = delta
        return xq

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0]
        return g * (1 + ctx.delta * g.sign() * ctx.saved_tensors[0]), None, None


def ewgs(x: Tensor, levels: int = 16, delta: float = 1e-3) -> Tensor:
    r"""Rounds x in [0, 1] to L levels; the gradient is :math:`g\,(1 + \delta\,\mathrm{sign}(g)\,(x - x_q))`.

    Args:
        x: Values in [0, 1].
        levels: L >= 2.
        delta: >= 0; 0 is the straight-through estimator. From 2(L-1) on it can flip signs, which warns.

    Source: Lee et al., Network Quantization with Element-wise Gradient Scaling, arXiv 2104.00903.
    """
    check_range("ewgs", "delta", delta, 0)
    if levels < 2:
        raise LossplugError(f"levels is {levels}, allowed is >= 2", where="ewgs")
    if delta >= 2 * (levels - 1):
        warnings.warn(f"ewgs: delta {delta} is at least 2 (levels - 1) = {2 * (levels - 1)}, so gradients can flip")
    return _Ewgs.apply(x, levels, delta)


@register(
    "quantizer",
    "ewgs",
    family="learned scale",
    paper="Network Quantization with Element-wise Gradient Scaling",
    arxiv="2104.00903",
    roles=("weight", "activation"),
)
class EWGS(Quantizer):
    r"""Learned interval [l, u] with element-wise scaled gradients.

    :math:`x_n = \mathrm{clip}((x-l)/(u-l), 0, 1)`, rounded by :func:`ewgs`; l and u get ordinary gradients. Weights
    become :math:`|c|\,2(x_q - 1/2)` with a learned c, activations :math:`x_q (u-l) + l` (the paper keeps [0, 1] and
    leaves the scale to c; this form needs no second layer to undo it). c starts so that the mean magnitude of the
    weights stays, where the paper measures the layer's output. The update of delta by curvature is left out.

    Args:
        bits: 1 to 8; :math:`2^b` levels.
        delta: Strength >= 0.
        role: ``weight`` or ``activation``.
        init_batches: Training batches that set the interval of an activation.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "ewgs"
    scales: ClassVar[dict[str, float]] = {"l": -1.0, "u": 1.0, "c": 1.0}

    l: Tensor  # noqa: E741  the card's name
    u: Tensor
    c: Tensor

    def __init__(self, bits: int = 4, delta: float = 1e-3, role: Role = "weight", init_batches: int = 1) -> None:
        super().__init__(role=role, init_batches=init_batches)
        self.bits, self.delta = check_bits(self.name, bits, 1, 8), delta
        check_range(self.name, "delta", delta, 0)
        self.c.requires_grad_(role == "weight")

    def set_scales(self, x: Tensor) -> None:
        """Sets the interval: three deviations for weights, the paper's half-normal rule for activations."""
        deviation = x.std(correction=0).clamp_min(1e-8)
        if self.role == "weight":
            self.l.data.fill_(-3 * deviation)
            self.u.data.fill_(3 * deviation)
            self.c.data.fill_(1)
            self.c.data.fill_(x.abs().mean() / self.snap(x).abs().mean().clamp_min(1e-8))
        else:
            self.l.data.fill_(x.min())
            self.u.data.fill_(torch.maximum(3 * deviation / math.sqrt(1 - 2 / math.pi), x.min() + deviation))

    def _unit(self, x: Tensor) -> Tensor:
        return _Ewgs.apply(((x - self.l) / (self.u - self.l).clamp_min(EPS)).clamp(0, 1), 2**self.bits, self.delta)

    @property
    def has_zero(self) -> bool:
        """An even number of levels around 0 has none there."""
        return False

    def check_ready(self) -> None:
        """Also refuses an interval without width."""
        super().check_ready()
        if not bool(self.u > self.l):
            raise LossplugError(
                "the learned interval has no width left (u <= l)",
                where=self.where,
                remedy="Train with a smaller learning rate of the scales",
            )

    def snap(self, x: Tensor) -> Tensor:
        """The interval, :func:`ewgs`, and back."""
        xq = self._unit(x)
        if self.role == "weight":
            return self.c.abs() * (2 * (xq - 0.5))
        return xq * (self.u - self.l) + self.l
