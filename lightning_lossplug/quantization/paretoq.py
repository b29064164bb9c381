"""One family of weight quantisers from 4 bits to 1: learned step, stretched elastic grid, elastic binarisation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import Role, grad_factor, sum_like
from lightning_lossplug.quantization.lsq import StepFunction
from lightning_lossplug.registry import register

BITS = (1, 1.58, 2, 3, 4)
LEAST = 1e-5  # alpha is clamped here where it is used
STRETCH = {1.58: (1.5, 0.0), 2: (2.0, 0.5)}  # number of levels / 2 and shift of the stretched elastic grid


def check_bit_width(bits: float) -> float:
    """Returns ``bits``, or raises unless it is one of :data:`BITS`."""
    if bits not in BITS:
        raise LossplugError(
            f"bits is {bits!r}, allowed is 1, 1.58, 2, 3 or 4", where="paretoq", remedy="Use lsq for 5 to 8 bits"
        )
    return bits


class _Binary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(w, alpha)
        ctx.factor = factor
        return torch.where(w >= 0, 1.0, -1.0).to(w) * alpha.clamp_min(LEAST)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, alpha = ctx.saved_tensors
        g = grads[0]
        inside = (w / alpha.clamp_min(LEAST)).abs() <= 1
        return g * inside, sum_like(torch.where(w >= 0, g, -g), alpha) * ctx.factor, None


class _Stretched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, levels: float, shift: float, factor: float) -> Tensor:
        ctx.save_for_backward(w, alpha)
        ctx.grid = (levels, shift, factor)
        a = alpha.clamp_min(LEAST)
        # (2 round + 2 shift) is a whole number, so the value is a code times alpha / (2 L)
        code = ((w / a).clamp(-0.99, 0.99) * levels - shift).round() * 2 + 2 * shift
        return code * (a / (2 * levels))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, alpha = ctx.saved_tensors
        levels, shift, factor = ctx.grid
        g = grads[0]
        v = w / alpha.clamp_min(LEAST)
        q = ((v.clamp(-0.99, 0.99) * levels - shift).round() + shift) / levels
        top = (levels - shift) / levels
        slope = torch.where(v > 0.99, top, torch.where(v < -0.99, -top, q - v))
        return g * (v.abs() <= 0.99), sum_like(g * slope, alpha) * factor, None, None, None


def paretoq(w: Tensor, alpha: Tensor, bits: float = 2) -> Tensor:
    r"""ParetoQ's weight quantisers; with :math:`v = w/\alpha` and the gradient factor :math:`1/\sqrt{N Q_p}`.

    * 1 bit: :math:`\alpha\,\mathrm{sign}(w)`, sign(0) = 1; w gets g where :math:`|v| \le 1`, alpha the sum of
      g sign(w).
    * 1.58 (ternary, L = 1.5, shift 0) and 2 (L = 2, shift 1/2): stretched elastic levels
      :math:`\alpha\,(\mathrm{round}(\mathrm{clip}(v, \pm 0.99)\,L - shift) + shift)/L`; alpha gets the residual
      inside, :math:`\pm (L-shift)/L` beyond.
    * 3 and 4: :func:`lsq`.

    Args:
        w: Weights.
        alpha: Scales > 0 (below 1e-5 they act as 1e-5) that broadcast against ``w``: [C_out, 1] is one per row.
        bits: 1, 1.58, 2, 3 or 4.

    Raises:
        LossplugError: Another bit width.

    Source: Liu et al., ParetoQ, arXiv 2502.02631.
    """
    bits = check_bit_width(bits)
    if bits == 1:
        return _Binary.apply(w, alpha, grad_factor(w, 1, "numel"))
    if bits in STRETCH:
        return _Stretched.apply(w, alpha, *STRETCH[bits], grad_factor(w, 1, "numel"))
    top = 2 ** (int(bits) - 1) - 1
    return StepFunction.apply(w, alpha, float(-top - 1), float(top), grad_factor(w, top, "numel"), LEAST)


@register(
    "quantizer",
    "paretoq",
    family="low-bit",
    paper="ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization",
    arxiv="2502.02631",
    roles=("weight",),
)
class ParetoQ(Quantizer):
    """Elastic binarisation, stretched elastic grids and LSQ by bit width; see :func:`paretoq`.

    Args:
        bits: 1, 1.58 (ternary), 2, 3 or 4.
        per_channel: One scale per output row, as in the paper; False: one per tensor.
        group_size: One scale per this many consecutive entries of a row.
        axis: Axis of the rows.
        role: ``weight``.

    Raises:
        LossplugError: Another bit width.
    """

    name: ClassVar[str] = "paretoq"
    scales: ClassVar[dict[str, float]] = {"alpha": 1.0}
    positive: tuple[str, ...] = ("alpha",)

    alpha: Tensor

    def __init__(
        self,
        bits: float = 2,
        per_channel: bool = True,
        group_size: int | None = None,
        axis: int = 0,
        role: Role = "weight",
    ) -> None:
        super().__init__(per_channel, group_size, axis, role)
        self.bits = check_bit_width(bits)

    def set_scales(self, x: Tensor) -> None:
        """Mean magnitude for 1 bit, the largest for stretched grids, the largest over Qp for 3 and 4 bits."""
        dims = self.layout.dims(x.ndim)
        if self.bits == 1:
            alpha = x.abs().mean(dims, keepdim=True)
        else:
            top = 1 if self.bits in STRETCH else 2 ** (int(self.bits) - 1) - 1
            alpha = x.abs().amax(dims, keepdim=True) / top
        self.alpha.data.copy_(alpha.clamp_min(LEAST).reshape(self.alpha.shape))

    @property
    def has_zero(self) -> bool:
        """1 and 2 bits have no level at 0."""
        return self.bits not in (1, 2)

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`paretoq`."""
        return paretoq(x, self.alpha, self.bits)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step: alpha, or alpha / 2L on the stretched grids, whose codes are even or odd whole numbers."""
        a = self.alpha.detach().clamp_min(LEAST)
        return (a / (2 * STRETCH[self.bits][0]) if self.bits in STRETCH else a), None
