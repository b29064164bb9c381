"""One-bit weights with other surrogates: ReSTE, BiPer, statistics (TBT), several bases (BinaryDM)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import Role, check_range, sum_like
from lightning_lossplug.registry import register


def sign(x: Tensor) -> Tensor:
    """Returns 1 where ``x >= 0`` and -1 elsewhere: two levels, unlike ``torch.sign``."""
    return torch.where(x >= 0, 1.0, -1.0).to(x)


class _Reste(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, o: float, t: float, m: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shape = (o, t, m)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        o, t, m = ctx.shape
        size = ctx.saved_tensors[0].abs()
        slope = size.clamp_min(m).pow((1 - o) / o) / o
        slope = torch.where(size <= m, m ** (1 / o) / m, slope)
        return grads[0] * torch.where(size > t, 0.0, slope), None, None, None


def reste(x: Tensor, o: float = 3.0, t: float = 1.5, m: float = 0.1) -> Tensor:
    r"""Returns sign(x) (sign(0) = 1) with the gradient of a power function: :math:`g\,h(x)`.

    :math:`h = \frac{1}{o}|x|^{(1-o)/o}` for m < |x| <= t, its secant :math:`m^{1/o}/m` for |x| <= m, 0 beyond t.

    Args:
        x: Any shape.
        o: Power >= 1; 1 is the straight-through estimator clipped at t.
        t: Clip > m.
        m: Half-width of the interval with a finite slope, > 0.

    Raises:
        LossplugError: A value out of range.

    Source: Wu et al., Estimator Meets Equilibrium Perspective, arXiv 2308.06689.
    """
    check_range("reste", "o", o, 1)
    check_range("reste", "m", m, 1e-12)
    if t <= m:
        raise LossplugError(f"t is {t} and m {m}, allowed is t > m", where="reste")
    return _Reste.apply(x, float(o), float(t), float(m))


def reste_power(fraction: float, o_end: float = 3.0) -> float:
    r"""Returns the power at a fraction of the run: :math:`1 + (1 - \cos(\pi f/2))\,(o_{end} - 1)`."""
    return 1 + (1 - math.cos(math.pi * fraction / 2)) * (o_end - 1)


@register(
    "quantizer",
    "reste",
    family="low-bit",
    paper="Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary Neural Networks",
    arxiv="2308.06689",
    roles=("weight", "activation"),
)
class ReSTE(Quantizer):
    """Binary values whose surrogate sharpens over training; see :func:`reste` and :func:`reste_power`.

    Weights are ``sign(w) * mean|w|`` over the whole tensor, with the gradient of the mean too; activations are signs.

    Args:
        o_end: Power at the end of the run, >= 1.
        t: Clip > m.
        m: Half-width of the interval with a finite slope.
        role: ``weight`` or ``activation``.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "reste"
    bits = 1

    def __init__(self, o_end: float = 3.0, t: float = 1.5, m: float = 0.1, role: Role = "weight") -> None:
        super().__init__(role=role)
        check_range(self.name, "o_end", o_end, 1)
        reste(torch.zeros(1), o_end, t, m)
        self.o_end, self.t, self.m = o_end, t, m
        self.power = 1.0

    @property
    def has_zero(self) -> bool:
        """Signs are never 0."""
        return False

    def advance(self, fraction: float) -> None:
        """Sets the power for a fraction of the run."""
        self.power = reste_power(fraction, self.o_end)

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`reste`."""
        binary = _Reste.apply(x, self.power, self.t, self.m)
        return binary * x.abs().mean() if self.role == "weight" else binary

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean magnitude, or 1."""
        return (x.abs().mean() if self.role == "weight" else x.new_ones(())).reshape(1), None


class _Periodic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, omega: float, stage: int) -> Tensor:
        ctx.save_for_backward(w)
        ctx.omega = omega
        wave = (omega * w).sin()
        return wave if stage == 1 else wave.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.omega * (ctx.omega * ctx.saved_tensors[0]).cos(), None, None


def biper(w: Tensor, omega: float = 20.0, stage: int = 2) -> Tensor:
    r"""Returns :math:`\sin(\omega w)` (stage 1) or its sign (stage 2); gradient :math:`g\,\omega\cos(\omega w)`.

    Stage 2 gives 0 where the sine is exactly 0, as its source does.

    Args:
        w: Weights.
        omega: Frequency > 0.
        stage: 1 or 2.

    Raises:
        LossplugError: A value out of range.

    Source: Vargas et al., BiPer, arXiv 2404.01278.
    """
    check_range("biper", "omega", omega, 1e-12)
    if stage not in (1, 2):
        raise LossplugError(f"stage is {stage!r}, allowed is 1 or 2", where="biper")
    return _Periodic.apply(w, float(omega), stage)


@register(
    "quantizer",
    "biper",
    family="low-bit",
    paper="BiPer: Binary Neural Networks using a Periodic Function",
    arxiv="2404.01278",
    roles=("weight",),
)
class BiPer(Quantizer):
    """Periodic binarisation with a learned scale per output channel; see :func:`biper`.

    The scale belongs to the layer's output; on the weight it is the same product. It starts at the mean magnitude of
    the channel instead of a random number, so that a trained network keeps its size.

    Args:
        omega: Frequency > 0.
        stage: 1 (the sine), 2 (its sign), or None: stage 1 for the first two thirds of the run.
        axis: Axis of the output channels.
        role: ``weight``.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "biper"
    scales: ClassVar[dict[str, float]] = {"alpha": 1.0}
    positive: tuple[str, ...] = ("alpha",)
    bits = 1

    alpha: Tensor

    def __init__(self, omega: float = 20.0, stage: int | None = None, axis: int = 0, role: Role = "weight") -> None:
        super().__init__(True, None, axis, role)
        biper(torch.zeros(1), omega, 2 if stage is None else stage)
        self.omega, self.stage = omega, stage
        self.current = 1 if stage is None else stage

    def advance(self, fraction: float) -> None:
        """Passes to stage 2 after two thirds of the run."""
        if self.stage is None:
            self.current = 2 if fraction >= 2 / 3 else 1

    def set_scales(self, x: Tensor) -> None:
        """Mean magnitude of each channel."""
        self.alpha.data.copy_(x.abs().mean(self.layout.dims(x.ndim), keepdim=True).clamp_min(1e-5))

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`biper`."""
        return _Periodic.apply(x, self.omega, self.current) * self.alpha

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The channel's scale; only stage 2 has codes."""
        if self.current == 1:
            raise LossplugError("the weights are real in stage 1", where=self.where, remedy="Finish the run")
        return self.alpha.detach(), None


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def tbt(w: Tensor, weight_bits: int = 1, axis: int = 0) -> Tensor:
    r"""Statistics-based binary and ternary weights; the gradient is g, unclipped.

    Binary: :math:`m\,\mathrm{sign}(w)`, :math:`m = \mathrm{mean}_{row}|w|`. Ternary: :math:`s = \frac43 m`,
    :math:`s\,\mathrm{round}(\mathrm{clip}(w/s, -1, 1))`.

    Args:
        w: Weights with at least two axes, a row being everything at one index of ``axis``.
        weight_bits: 1 (binary, sign(0) = 1) or 2 (ternary).
        axis: Axis of the rows.

    Raises:
        LossplugError: Other bits.

    Source: Liu et al., Binary and Ternary Natural Language Generation, arXiv 2306.01841.
    """
    if weight_bits not in (1, 2):
        raise LossplugError(f"weight_bits is {weight_bits!r}, allowed is 1 or 2 (ternary)", where="tbt")
    codes, scale = _tbt_codes(w.detach(), weight_bits, axis)
    return _Identity.apply(w, codes * scale)


def _tbt_codes(w: Tensor, weight_bits: int, axis: int) -> tuple[Tensor, Tensor]:
    mean = w.abs().mean([i for i in range(w.ndim) if i != axis % w.ndim], keepdim=True)
    if weight_bits == 1:
        return sign(w), mean
    scale = (mean * (4 / 3)).clamp_min(1e-12)
    return (w / scale).clamp(-1, 1).round(), scale


@register(
    "quantizer",
    "tbt",
    family="low-bit",
    paper="Binary and Ternary Natural Language Generation",
    arxiv="2306.01841",
    roles=("weight",),
)
class TBT(Quantizer):
    """Binary or ternary weights by the statistics of each row; see :func:`tbt`.

    Args:
        weight_bits: 1 or 2 (ternary).
        axis: Axis of the rows.
        role: ``weight``.

    Raises:
        LossplugError: Other bits.
    """

    name: ClassVar[str] = "tbt"

    def __init__(self, weight_bits: int = 1, axis: int = 0, role: Role = "weight") -> None:
        super().__init__(True, None, axis, role)
        tbt(torch.zeros(1, 1), weight_bits)
        self.weight_bits = weight_bits
        self.bits = 1 if weight_bits == 1 else 1.58

    @property
    def has_zero(self) -> bool:
        """Ternary weights have it."""
        return self.weight_bits == 2

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`tbt`."""
        return tbt(x, self.weight_bits, self.layout.axis)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The row's scale."""
        return _tbt_codes(x, self.weight_bits, self.layout.axis)[1], None


class _Bases(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, a1: Tensor, a2: Tensor | None) -> Tensor:
        first = sign(w)
        ctx.save_for_backward(w, a1, a2)
        if a2 is None:
            return first * a1
        return first * a1 + sign(w - a1 * first) * a2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, a1, a2 = ctx.saved_tensors
        g, first = grads[0], sign(w)
        if a2 is None:
            return g * a1 * (w.abs() <= 1), sum_like(g * first, a1), None
        rest = w - a1 * first
        through = g * a2 * (rest.abs() <= 1)
        dw = (g - through) * a1 * (w.abs() <= 1) + through
        return dw, sum_like((g - through) * first, a1), sum_like(g * sign(rest), a2)


def binarydm(w: Tensor, a1: Tensor, a2: Tensor | None = None) -> Tensor:
    r"""Binarises on one or two bases: :math:`a_1\,\mathrm{sign}(w) + a_2\,\mathrm{sign}(w - a_1\,\mathrm{sign}(w))`.

    Each sign passes gradients where its argument lies in [-1, 1]; both scales get theirs.

    Args:
        w: Weights.
        a1: Scales that broadcast against ``w``.
        a2: Scales of the second basis; None is one basis.

    Source: Zheng et al., BinaryDM, arXiv 2404.05662.
    """
    return _Bases.apply(w, a1, a2)


@register(
    "quantizer",
    "binarydm",
    family="low-bit",
    paper="BinaryDM: Accurate Weight Binarization for Efficient Diffusion Models",
    arxiv="2404.05662",
    roles=("weight",),
)
class BinaryDM(Quantizer):
    """Learned multi-basis binariser, one or two scales per output channel; see :func:`binarydm`.

    Args:
        order: Bases, 1 or 2.
        axis: Axis of the output channels.
        role: ``weight``.

    Raises:
        LossplugError: Another order.
    """

    name: ClassVar[str] = "binarydm"
    scales: ClassVar[dict[str, float]] = {"a1": 1.0, "a2": 1.0}

    a1: Tensor
    a2: Tensor

    def __init__(self, order: int = 2, axis: int = 0, role: Role = "weight") -> None:
        super().__init__(True, None, axis, role)
        if order not in (1, 2):
            raise LossplugError(f"order is {order!r}, allowed is 1 or 2", where=self.name)
        self.order = self.bits = order
        self.a2.requires_grad_(order == 2)

    def set_scales(self, x: Tensor) -> None:
        """Mean magnitude of the weights, then of what the first basis leaves."""
        dims = self.layout.dims(x.ndim)
        a1 = x.abs().mean(dims, keepdim=True)
        self.a1.data.copy_(a1)
        self.a2.data.copy_((x - a1 * sign(x)).abs().mean(dims, keepdim=True))

    @property
    def has_zero(self) -> bool:
        """Sums of signs miss 0."""
        return False

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`binarydm`."""
        return _Bases.apply(x, self.a1, self.a2 if self.order == 2 else None)
