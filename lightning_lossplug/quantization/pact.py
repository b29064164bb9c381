"""A learned clipping level for activations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import Role, check_bits, check_range, sum_like
from lightning_lossplug.registry import register

LEAST = 1e-3  # alpha is clamped here where it is used


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, bits: int, signed: bool) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.signed = signed
        top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        a = alpha.clamp_min(LEAST)
        step = a / top
        clipped = torch.minimum(torch.maximum(x, -a if signed else torch.zeros_like(a)), a)
        return (clipped / step).round_().mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        a, g = alpha.clamp_min(LEAST), grads[0]
        above = x >= a
        below = x <= -a if ctx.signed else None
        inside = (x <= a) & (x >= (-a if ctx.signed else 0))
        slope = above.to(g) if below is None else above.to(g) - below.to(g)
        return g * inside, sum_like(g * slope, alpha), None, None


def pact(x: Tensor, alpha: Tensor, bits: int = 4, signed: bool = False) -> Tensor:
    r"""Clips to [0, alpha] and rounds to :math:`2^b` levels: :math:`\mathrm{round}(y n/\alpha)\,\alpha/n`, n = 2^b - 1.

    x gets g inside [0, alpha], alpha the sum of g where x >= alpha (no rounding term, unlike LSQ).

    Args:
        x: Any shape.
        alpha: Clipping level (below 1e-3 it acts as 1e-3), one value.
        bits: 2 to 8.
        signed: Clip to [-alpha, alpha] with :math:`2^{b-1}-1` levels on each side; not in the paper.

    Source: Choi et al., PACT, arXiv 1805.06085.
    """
    return _Pact.apply(x, alpha, check_bits("pact", bits, 2, 8), signed)


@register(
    "quantizer",
    "pact",
    family="learned scale",
    paper="PACT: Parameterized Clipping Activation for Quantized Neural Networks",
    arxiv="1805.06085",
    roles=("activation",),
)
class PACT(Quantizer):
    r"""Parameterised clipping of activations; see :func:`pact`.

    Args:
        bits: 2 to 8.
        alpha_init: First clipping level; None takes the largest magnitude of the first batch (the paper's 10 is meant
            for ReLU networks with a decay that brings it down).
        alpha_decay: Strength of the penalty :math:`\lambda\alpha^2`, >= 0; its gradient joins alpha's before the step.
        signed: None decides by the sign of the first batch.
        init_batches: Training batches that set alpha.
        role: ``activation``.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "pact"
    scales: ClassVar[dict[str, float]] = {"alpha": 1.0}
    positive: tuple[str, ...] = ("alpha",)

    alpha: Tensor

    def __init__(
        self,
        bits: int = 4,
        alpha_init: float | None = 10.0,
        alpha_decay: float = 2e-4,
        signed: bool | None = None,
        init_batches: int = 1,
        role: Role = "activation",
    ) -> None:
        super().__init__(role=role, init_batches=init_batches)
        self.bits = check_bits(self.name, bits, 2, 8)
        check_range(self.name, "alpha_decay", alpha_decay, 0)
        if alpha_init is not None:
            check_range(self.name, "alpha_init", alpha_init, LEAST)
        self.alpha_init, self.alpha_decay, self.signed = alpha_init, alpha_decay, signed

    @property
    def is_signed(self) -> bool:
        """Whether the grid has negative levels."""
        return self.mode[1] if self.signed is None else self.signed

    def set_scales(self, x: Tensor) -> None:
        """Sets alpha."""
        level = x.abs().max() if self.alpha_init is None else x.new_tensor(self.alpha_init)
        self.alpha.data.copy_(level.clamp_min(LEAST).reshape(1))

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`pact`."""
        return _Pact.apply(x, self.alpha, self.bits, self.is_signed)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The step alpha / n."""
        top = 2 ** (self.bits - 1) - 1 if self.is_signed else 2**self.bits - 1
        return self.alpha.detach().clamp_min(LEAST) / top, None

    @torch.no_grad()
    def add_gradients(self, grad_scale: float = 1.0) -> None:
        """Adds ``2 alpha_decay alpha``."""
        if self.alpha.grad is not None:
            self.alpha.grad.add_(self.alpha, alpha=2 * self.alpha_decay * grad_scale)
