"""Learned step and learned offset, for activations that are not centred at 0 (swish, GELU)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import (
    EPS,
    GradScale,
    Role,
    check_bits,
    check_choice,
    grad_factor,
    integer_range,
    sum_like,
)
from lightning_lossplug.quantization.least_error import mse_ends, mse_step
from lightning_lossplug.registry import register


class _OffsetFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, beta: Tensor, n: float, p: float, factor: float, integer: bool
    ) -> Tensor:
        ctx.save_for_backward(x, s, beta)
        ctx.range = (n, p, factor, integer)
        step = s.clamp_min(EPS)
        if integer:
            z = (-beta / step).round().clamp(n, p)
            return ((x / step).round_().add_(z).clamp_(n, p).sub_(z)).mul_(step)
        return ((x - beta) / step).clamp_(n, p).round_().mul_(step).add_(beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, beta = ctx.saved_tensors
        n, p, factor, integer = ctx.range
        g, step = grads[0], s.clamp_min(EPS)
        if integer:
            z = (-beta / step).round().clamp(n, p)
            v, shift = x / step + z, z
        else:
            v, shift = (x - beta) / step, torch.zeros_like(step)
        clipped = v.clamp(n, p)
        inside = v == clipped
        # d/ds: the rounding residual inside; outside the code, counted from the zero-point where that is an integer
        slope = torch.where(inside, clipped.round() - v, clipped - shift)
        return g * inside, sum_like(g * slope, s) * factor, sum_like(g * ~inside, beta) * factor, None, None, None, None


def lsq_plus(
    x: Tensor,
    s: Tensor,
    beta: Tensor,
    bits: int = 4,
    signed: bool = False,
    grad_scale: GradScale = "numel",
    integer_zero_point: bool = False,
) -> Tensor:
    r"""LSQ with an offset: :math:`\hat x = s\,\mathrm{round}(\mathrm{clip}((x-\beta)/s, n, p)) + \beta`.

    With :math:`v = (x-\beta)/s` and an upstream g: x gets g inside the range; s gets LSQ's residual, n or p; beta gets
    0 inside and g outside; the last two times :math:`1/\sqrt{N p}`.

    Args:
        x: Any shape.
        s: Steps > 0 that broadcast against ``x``.
        beta: Offsets, shaped as ``s``.
        bits: 1 to 8.
        signed: Codes of two's complement instead of 0 to :math:`2^b-1`.
        grad_scale: ``numel``, ``paper`` or ``none``; see :func:`lsq`.
        integer_zero_point: Round :math:`-\beta/s` to a code, so that 0 stays representable; then s gets the code
            counted from that zero-point outside the range.

    Source: Bhalgat et al., LSQ+, arXiv 2004.09576.
    """
    bits = check_bits("lsq_plus", bits, 1, 8)
    n, p = integer_range(bits, signed)
    if p == 0:
        raise LossplugError("1 signed bit has no positive level", where="lsq_plus", remedy="Use signed=False")
    return _OffsetFunction.apply(x, s, beta, float(n), float(p), grad_factor(x, p, grad_scale), integer_zero_point)


@register(
    "quantizer",
    "lsq_plus",
    family="learned scale",
    paper="LSQ+: Improving low-bit quantization through learnable offsets and better initialization",
    arxiv="2004.09576",
    roles=("weight", "activation"),
)
class LSQPlus(Quantizer):
    r"""LSQ with a learned offset and its initialisation; see :func:`lsq_plus`.

    Weights are symmetric: beta stays 0.

    Args:
        bits: 2 to 8.
        learn_offset: Train beta (activations only); False keeps 0, which is LSQ.
        integer_zero_point: Round the offset to a whole code in every pass, so that 0 (zero padding) is exact and the
            integer model is the trained one; False is the paper's float offset, which has no integer form.
        grad_scale: ``paper``, ``numel`` or ``none``.
        init: ``lsq_plus``: weights from :math:`s = \max(|\mu-3\sigma|, |\mu+3\sigma|)/2^{b-1}`, as published, and
            activations from the range of the first batch. ``mse``: the step, or step and offset, of least squared
            error on a grid.
        per_channel: One step per index of ``axis``.
        group_size: One step per this many consecutive entries of a channel.
        axis: Axis of the channels.
        role: ``weight`` or ``activation``.
        init_batches: Training batches that set step and offset of an activation.

    Raises:
        LossplugError: Bits out of range, or an unknown choice.
    """

    name: ClassVar[str] = "lsq_plus"
    scales: ClassVar[dict[str, float]] = {"s": 1.0, "beta": 0.0}
    positive: tuple[str, ...] = ("s",)

    s: Tensor
    beta: Tensor

    def __init__(
        self,
        bits: int = 4,
        learn_offset: bool = True,
        integer_zero_point: bool = True,
        grad_scale: Literal["paper", "numel", "none"] = "paper",
        init: Literal["lsq_plus", "mse"] = "lsq_plus",
        per_channel: bool = False,
        group_size: int | None = None,
        axis: int = 0,
        role: Role = "weight",
        init_batches: int = 1,
    ) -> None:
        super().__init__(per_channel, group_size, axis, role, init_batches)
        self.bits = check_bits(self.name, bits, 2, 8)
        check_choice(self.name, "grad_scale", grad_scale, ("paper", "numel", "none"))
        check_choice(self.name, "init", init, ("lsq_plus", "mse"))
        self.init = init
        self.grad_scale = "numel" if grad_scale == "paper" and role == "weight" else grad_scale
        self.integer_zero_point = integer_zero_point
        self.learn_offset = learn_offset and role == "activation"
        self.beta.requires_grad_(self.learn_offset)

    @property
    def bounds(self) -> tuple[int, int]:
        """Signed for weights, from 0 for activations with an offset or without negative values."""
        return integer_range(self.bits, self.role == "weight" or (not self.learn_offset and self.mode[1]))

    def set_scales(self, x: Tensor) -> None:
        """Sets step and offset."""
        n, p = self.bounds
        dims = self.layout.dims(x.ndim)
        if self.learn_offset:
            lo, hi = mse_ends(x, p - n + 1) if self.init == "mse" else (x.min().clamp_max(0), x.max().clamp_min(0))
            s = ((hi - lo) / (p - n)).clamp_min(EPS).reshape(1)
            self.beta.data.copy_((lo - n * s).reshape(1))
        elif self.init == "mse":
            s = mse_step(x, dims, n, p).clamp_min(EPS)
        else:
            mean, sigma = x.mean(dims, keepdim=True), x.std(dims, correction=0, keepdim=True)
            reach = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs())
            s = (reach / (p + 1)).clamp_min(EPS)
        self.s.data.copy_(s.reshape(self.s.shape))

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`lsq_plus`."""
        n, p = self.bounds
        factor = grad_factor(x, p, self.grad_scale)
        return _OffsetFunction.apply(x, self.s, self.beta, float(n), float(p), factor, self.integer_zero_point)

    @property
    def has_codes(self) -> bool:
        """A float offset has none."""
        return self.integer_zero_point or not self.learn_offset

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and zero-point."""
        if not self.has_codes:
            raise LossplugError(
                "a float offset has no integer codes", where=self.where, remedy="Train with integer_zero_point=True"
            )
        n, p = self.bounds
        step = self.s.detach().clamp_min(EPS)
        return step, (-self.beta.detach() / step).round().clamp(n, p) if self.learn_offset else None
