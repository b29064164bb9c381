"""Learned step size: the step is a parameter whose gradient sees the rounding residual."""

from __future__ import annotations

import math
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
from lightning_lossplug.quantization.least_error import mse_step, scale_of_range
from lightning_lossplug.registry import register


class StepFunction(torch.autograd.Function):
    """``s * round(clip(x/s, Qn, Qp))`` with LSQ's two gradients.

    PyTorch's ``_fake_quantize_learnable_per_tensor_affine`` is not used: it takes its clip mask after rounding, so the
    gradients of elements up to half a step beyond the range are not LSQ's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, qn: float, qp: float, factor: float, floor: float = EPS) -> Tensor:
        """Returns the value; steps below ``floor`` act as ``floor`` and keep their gradient."""
        step = s.clamp_min(floor)
        y = (x / step).clamp_(qn, qp).round_().mul_(step)
        ctx.save_for_backward(x, s, y)
        ctx.range = (qn, qp, factor, floor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of ``x`` and ``s``."""
        x, s, y = ctx.saved_tensors
        qn, qp, factor, floor = ctx.range
        g, step = grads[0], s.clamp_min(floor)
        dx = _within(g, x, step, qn, qp)
        ds = None
        if ctx.needs_input_grad[1]:
            # round(v) - v inside and Qn or Qp beyond is (y - x) / s inside and y / s beyond: two products, no slope
            ds = _difference(g, y, dx, x, s) * (factor / step)
        return dx, ds, None, None, None, None


def _within(g: Tensor, x: Tensor, step: Tensor, qn: float, qp: float) -> Tensor:
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and g.dtype == x.dtype
    if not plain or torch.compiler.is_compiling():
        return torch.where((x >= qn * step) & (x <= qp * step), g, 0.0)
    # One pass of a vectorised kernel; it leaves the ends out, so they are moved by one float each.
    if step.numel() > 1:
        low, high = torch.tensor(qn), torch.tensor(qp)
        x = x / step
    else:
        low, high = qn * step, qp * step
    below, above = torch.nextafter(low, low - 1), torch.nextafter(high, high + 1)
    return torch.ops.aten.hardtanh_backward(g, x, below.item(), above.item())


def _difference(g: Tensor, y: Tensor, dx: Tensor, x: Tensor, s: Tensor) -> Tensor:
    """Returns the sums of ``g y - dx x`` over what a step is shared by."""
    if s.numel() == 1 and all(t.is_contiguous() for t in (g, y, dx, x)):
        return (torch.dot(g.view(-1), y.view(-1)) - torch.dot(dx.view(-1), x.view(-1))).reshape(s.shape)
    return sum_like((g * y).addcmul_(dx, x, value=-1), s)


def lsq(
    x: Tensor,
    s: Tensor,
    bits: int = 4,
    signed: bool = True,
    narrow: bool = False,
    grad_scale: GradScale = "numel",
) -> Tensor:
    r"""Learned step size quantisation :math:`\hat x = s\,\mathrm{round}(\mathrm{clip}(x/s, Q_n, Q_p))`.

    Gradients for an upstream g: :math:`g\,1[Q_n \le x/s \le Q_p]` for x, and for s the sum of g times
    ``round(v) - v`` inside, ``Qn`` below, ``Qp`` above, times :math:`1/\sqrt{N Q_p}`.

    Args:
        x: Any shape.
        s: Steps > 0 that broadcast against ``x`` (smaller ones act as 1e-8).
        bits: 1 (unsigned only) to 16.
        signed: From :math:`-2^{b-1}`, else from 0.
        narrow: Leave the most negative code out.
        grad_scale: ``numel`` (N counts ``x``), ``paper`` (N counts one sample, the first axis being the batch) or
            ``none`` (factor 1).

    Raises:
        LossplugError: A grid without a positive level.

    Source: Esser et al., Learned Step Size Quantization, arXiv 1902.08153.
    """
    bits = check_bits("lsq", bits, 1, 16)
    qn, qp = integer_range(bits, signed, narrow)
    if qp == 0:
        raise LossplugError(
            "1 signed bit has no positive level", where="lsq", remedy="Use paretoq, whose 1 bit is elastic binarisation"
        )
    return StepFunction.apply(x, s, float(qn), float(qp), grad_factor(x, qp, grad_scale))


@register(
    "quantizer",
    "lsq",
    family="learned scale",
    paper="Learned Step Size Quantization",
    arxiv="1902.08153",
    roles=("weight", "activation"),
)
class LSQ(Quantizer):
    r"""Learned step size: :math:`\hat x = s\,\mathrm{round}(\mathrm{clip}(x/s, Q_n, Q_p))`; see :func:`lsq`.

    Args:
        bits: 2 to 8.
        signed: None decides by the sign of the first data: activations that are never negative get the unsigned grid.
        narrow: Leave the most negative code out.
        grad_scale: Factor of the step's gradient; ``paper`` counts one sample of an activation, all of a weight.
        init: ``lsq`` (:math:`2\,\mathrm{mean}|x|/\sqrt{Q_p}`, as published), ``minmax``, ``mse`` (least squared error
            on a grid), or ``auto``: ``lsq`` up to 4 bits and ``minmax`` above, where the published start clips at
            :math:`2\sqrt{Q_p}` means, 22 of them at 8 bits, which breaks models with large activations (SmolLM2,
            untrained: perplexity 3,833 instead of 36). ``QAT`` asks for ``mse`` up to 4 bits.
        scale_param: ``linear`` learns s, ``log`` learns log s, which can't cross 0.
        per_channel: One step per index of ``axis``.
        group_size: One step per this many consecutive entries of a channel.
        axis: Axis of the channels.
        role: ``weight`` or ``activation``.
        init_batches: Training batches that set the step of an activation.

    Raises:
        LossplugError: Bits out of range, or an unknown choice.
    """

    name: ClassVar[str] = "lsq"
    scales: ClassVar[dict[str, float]] = {"s": 1.0}

    s: Tensor

    def __init__(
        self,
        bits: int = 4,
        signed: bool | None = None,
        narrow: bool = False,
        grad_scale: GradScale = "paper",
        init: Literal["auto", "lsq", "minmax", "mse"] = "auto",
        scale_param: Literal["linear", "log"] = "linear",
        per_channel: bool = False,
        group_size: int | None = None,
        axis: int = 0,
        role: Role = "weight",
        init_batches: int = 1,
    ) -> None:
        super().__init__(per_channel, group_size, axis, role, init_batches)
        low = "For 1 and 1.58 bits use the quantiser paretoq"
        self.bits = check_bits(self.name, bits, 2, 8, low if isinstance(bits, (int, float)) and bits < 2 else None)
        check_choice(self.name, "grad_scale", grad_scale, ("paper", "numel", "none"))
        check_choice(self.name, "init", init, ("auto", "lsq", "minmax", "mse"))
        check_choice(self.name, "scale_param", scale_param, ("linear", "log"))
        self.signed, self.narrow, self.init, self.scale_param = signed, narrow, init, scale_param
        self.grad_scale = "numel" if grad_scale == "paper" and role == "weight" else grad_scale
        self.positive = ("s",) if scale_param == "linear" else ()

    @property
    def bounds(self) -> tuple[int, int]:
        """``(Qn, Qp)``; unsigned when asked for, or when activations have never been negative."""
        signed = self.signed if self.signed is not None else self.role == "weight" or self.mode[1]
        return integer_range(self.bits, signed, self.narrow)

    def step(self) -> Tensor:
        """Returns the step itself."""
        return self.s.exp() if self.scale_param == "log" else self.s

    def set_scales(self, x: Tensor) -> None:
        """Sets the step by ``init``; an all-zero channel gets the mean of the others, an all-zero tensor 1."""
        qn, qp = self.bounds
        dims = self.layout.dims(x.ndim)
        init = self.init if self.init != "auto" else "lsq" if self.bits <= 4 else "minmax"
        if init == "lsq":
            step = 2 * x.abs().mean(dims, keepdim=True) / math.sqrt(qp)
        elif init == "minmax":
            step = scale_of_range(x, dims, qn, qp)
        else:
            step = mse_step(x, dims, qn, qp)
        step = step.reshape(self.s.shape)
        live = step > EPS
        spare = step[live].mean() if bool(live.any()) else step.new_ones(())
        step = torch.where(live, step, spare)
        self.s.data.copy_(step.log() if self.scale_param == "log" else step)

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`lsq`."""
        qn, qp = self.bounds
        return StepFunction.apply(x, self.step(), float(qn), float(qp), grad_factor(x, qp, self.grad_scale))

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The step; the code of 0 is 0."""
        return self.step().detach().clamp_min(EPS), None
