"""DoReFa: weights through tanh onto a symmetric grid without 0, activations onto [0, 1]."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import Role, check_bits
from lightning_lossplug.registry import register


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int, keep_scale: bool) -> Tensor:
        if bits == 1:
            scale = w.abs().mean()
            return torch.sign(w / scale.clamp_min(1e-12)) * scale
        n = 2**bits - 1
        t = w.tanh()
        m = t.abs().max().clamp_min(1e-12)
        ctx.save_for_backward(t, m)
        ctx.keep_scale = keep_scale
        # one product of an integer and a step: exact codes for the export
        codes = ((t / (2 * m) + 0.5) * n).round() * 2 - n
        return codes * ((m if keep_scale else torch.ones_like(m)) / n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0]
        if not ctx.saved_tensors:
            return g, None, None
        t, m = ctx.saved_tensors
        slope = 1 - t * t
        return g * (slope if ctx.keep_scale else slope / m), None, None


class _Activations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward((x >= 0) & (x <= 1))
        n = 2**bits - 1
        return (x.clamp(0, 1) * n).round_() * (1.0 / n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None


def dorefa(w: Tensor, bits: int = 4, keep_scale: bool = True) -> Tensor:
    r"""Quantises weights through :math:`t = \tanh w`, :math:`m = \max|t|`, n = 2^b - 1.

    :math:`\hat w = m\,(2\,\mathrm{round}((t/2m + 1/2)\,n)/n - 1)`, gradient :math:`g\,(1-t^2)` (m is a constant). One
    bit: :math:`\mathrm{mean}|w|\,\mathrm{sign}(w)` with sign(0) = 0 and gradient g.

    Args:
        w: Weights; maximum and mean are over all of them.
        bits: 1 to 8; 32 is the identity.
        keep_scale: Keep the factor m, as public code does; the paper's output lies in [-1, 1] (gradient over m).

    Source: Zhou et al., DoReFa-Net, arXiv 1606.06160.
    """
    if bits == 32:
        return w
    return _Weights.apply(w, check_bits("dorefa", bits, 1, 8), keep_scale)


def dorefa_activation(x: Tensor, bits: int = 4) -> Tensor:
    r"""Returns :math:`\mathrm{round}(\mathrm{clip}(x, 0, 1)\,n)/n` with gradient g on [0, 1]; see :func:`dorefa`."""
    return _Activations.apply(x, check_bits("dorefa", bits, 2, 8))


@register(
    "quantizer",
    "dorefa",
    family="fixed scale",
    paper="DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients",
    arxiv="1606.06160",
    roles=("weight", "activation"),
)
class DoReFa(Quantizer):
    """DoReFa's weight and activation quantisers, without any learned scale; see :func:`dorefa`.

    Args:
        bits: 1 to 8 for weights, 2 to 8 for activations (which are clipped to [0, 1]).
        keep_scale: Keep the largest magnitude of the weights.
        role: ``weight`` or ``activation``.

    Raises:
        LossplugError: Bits out of range.
    """

    name: ClassVar[str] = "dorefa"

    def __init__(self, bits: int = 4, keep_scale: bool = True, role: Role = "weight") -> None:
        super().__init__(role=role)
        self.bits = check_bits(self.name, bits, 1 if role == "weight" else 2, 8)
        self.keep_scale = keep_scale

    @property
    def has_zero(self) -> bool:
        """Weights have an even number of levels."""
        return self.role == "activation"

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`dorefa` and :func:`dorefa_activation`."""
        if self.role == "activation":
            return _Activations.apply(x, self.bits)
        return _Weights.apply(x, self.bits, self.keep_scale)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step of the grid; weights have odd codes from -n to n."""
        n = 2**self.bits - 1
        if self.role == "activation":
            return x.new_full((1,), 1.0 / n), None
        if self.bits == 1:
            return x.abs().mean().reshape(1), None
        m = x.tanh().abs().max().clamp_min(1e-12) if self.keep_scale else x.new_ones(())
        return (m / n).reshape(1), None
