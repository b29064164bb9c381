"""Ranges from data (min-max, moving average, percentile, least error) and plain fake quantisation on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import (
    EPS,
    Role,
    check_bits,
    check_choice,
    check_range,
    largest_over_ranks,
)
from lightning_lossplug.registry import register

Dims = Sequence[int]
OBSERVERS = ("minmax", "ema", "percentile", "mse")


def minmax_range(x: Tensor, dims: Dims | None = None) -> tuple[Tensor, Tensor]:
    """Returns the least and the largest value over ``dims`` (all by default), kept as axes of one."""
    dims = list(range(x.ndim)) if dims is None else list(dims)
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


def percentile_range(x: Tensor, percentile: float = 0.9999, dims: Dims | None = None) -> tuple[Tensor, Tensor]:
    """Returns the (1 - p) and p quantiles over ``dims``, by order statistics, which know no limit of size.

    Args:
        x: Data.
        percentile: p, 0.5 < p <= 1.
        dims: Axes that share a range; all by default.

    Raises:
        LossplugError: p out of range.
    """
    if not 0.5 < percentile <= 1:
        raise LossplugError(f"percentile is {percentile}, allowed is (0.5, 1]", where="fake_quant")
    dims = list(range(x.ndim)) if dims is None else [d % x.ndim for d in dims]
    kept = [d for d in range(x.ndim) if d not in dims]
    flat = x.permute(*kept, *dims).reshape(*[x.shape[d] for d in kept], -1)
    n = flat.shape[-1]
    high = min(n, max(1, round(percentile * (n - 1)) + 1))
    shape = [1 if d in dims else x.shape[d] for d in range(x.ndim)]
    upper = flat.kthvalue(high, dim=-1).values.reshape(shape)
    return flat.kthvalue(n + 1 - high, dim=-1).values.reshape(shape), upper


def affine_parameters(
    lo: Tensor, hi: Tensor, bits: int, symmetric: bool = False, narrow_range: bool = True
) -> tuple[Tensor, Tensor, int, int]:
    r"""Returns ``(s, z, lowest code, highest code)`` of a range that is widened to hold 0.

    Asymmetric: :math:`s = (hi-lo)/(2^b-1)`, :math:`z = \mathrm{round}(-lo/s)`, codes 0 to :math:`2^b-1`. Symmetric:
    :math:`s = \max(|lo|, hi)/(2^{b-1}-1)`, z = 0, codes from :math:`-(2^{b-1}-1)` (or one below it unless
    ``narrow_range``).
    """
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        s = (torch.maximum(-lo, hi) / top).clamp_min(EPS)
        return s, torch.zeros_like(s), -top if narrow_range else -top - 1, top
    top = 2**bits - 1
    s = ((hi - lo) / top).clamp_min(EPS)
    return s, (-lo / s).round().clamp(0, top), 0, top


def mse_range(
    x: Tensor, bits: int, symmetric: bool = False, dims: Dims | None = None, p: float = 2.4, narrow_range: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns the range with the least mean ``|x - Q(x)|^p`` among min-max shrunk by 0, 1 ... 79 percent."""
    dims = list(range(x.ndim)) if dims is None else list(dims)
    lo, hi = minmax_range(x, dims)
    best_lo, best_hi, best = lo, hi, torch.full_like(lo, torch.inf)
    for i in range(80):
        keep = 1 - 0.01 * i
        value = _affine(x, *affine_parameters(lo * keep, hi * keep, bits, symmetric, narrow_range))
        error = (x - value).abs().pow(p).mean(dims, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_lo, best_hi = torch.where(better, lo * keep, best_lo), torch.where(better, hi * keep, best_hi)
    return best_lo, best_hi


def _affine(x: Tensor, s: Tensor, z: Tensor, low: int, high: int) -> Tensor:
    return ((x / s).round() + z).clamp(low, high).sub(z) * s


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, z: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, s, z)
        ctx.range = (low, high)
        return _affine(x, s, z, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, z = ctx.saved_tensors
        low, high = ctx.range
        inside = (x >= (low - z) * s) & (x <= (high - z) * s)
        return grads[0] * inside, None, None, None, None


def fake_quant(x: Tensor, s: Tensor, z: Tensor | None = None, low: int = -127, high: int = 127) -> Tensor:
    r"""Returns :math:`(\mathrm{clip}(\mathrm{round}(x/s) + z, low, high) - z)\,s`; gradients pass inside the range.

    Args:
        x: Any shape.
        s: Steps > 0 that broadcast against ``x``; they get no gradient.
        z: Zero-points, whole numbers; None is 0.
        low: Least code.
        high: Largest code.

    Source: Jacob et al. 2018, arXiv 1712.05877; Krishnamoorthi 2018, arXiv 1806.08342.
    """
    return _FakeQuant.apply(x, s, torch.zeros_like(s) if z is None else z, low, high)


@register(
    "quantizer",
    "fake_quant",
    family="observer",
    paper="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    arxiv="1712.05877",
    roles=("weight", "activation"),
)
class FakeQuant(Quantizer):
    r"""Plain fake quantisation on an observed range: :func:`fake_quant`, the range gets no gradient.

    Weights are measured anew at every pass. The range of activations is what the observer has gathered over training
    batches: the extremes (``minmax``, ``percentile`` and ``mse`` of each batch) or their moving average (``ema``); it
    is joined over processes.

    Args:
        bits: 2 to 8.
        symmetric: Zero-point 0, else affine codes from 0.
        observer: ``minmax``, ``ema``, ``percentile`` or ``mse``.
        percentile: Quantile of ``percentile``, in (0.5, 1].
        ema: Share of the new batch in the moving average, in (0, 1].
        freeze_after: Batches after which the range of an activation stays; None: never.
        narrow_range: Symmetric codes without the most negative one.
        per_channel: One range per index of ``axis``.
        group_size: One range per this many consecutive entries of a channel.
        axis: Axis of the channels.
        role: ``weight`` or ``activation``.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "fake_quant"

    lo: Tensor
    hi: Tensor

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = False,
        observer: Literal["minmax", "ema", "percentile", "mse"] = "minmax",
        percentile: float = 0.9999,
        ema: float = 0.1,
        freeze_after: int | None = None,
        narrow_range: bool = True,
        per_channel: bool = False,
        group_size: int | None = None,
        axis: int = 0,
        role: Role = "weight",
    ) -> None:
        super().__init__(per_channel, group_size, axis, role)
        self.bits = check_bits(self.name, bits, 2, 8)
        check_choice(self.name, "observer", observer, OBSERVERS)
        check_range(self.name, "ema", ema, 1e-6, 1)
        if not 0.5 < percentile <= 1:
            raise LossplugError(f"percentile is {percentile}, allowed is (0.5, 1]", where=self.name)
        if freeze_after is not None:
            check_range(self.name, "freeze_after", freeze_after, 1)
        self.symmetric, self.observer, self.percentile, self.ema = symmetric, observer, percentile, ema
        self.freeze_after, self.narrow_range = freeze_after, narrow_range
        self.register_buffer("lo", torch.zeros(1))
        self.register_buffer("hi", torch.zeros(1))

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the range of one arranged tensor by the observer's rule."""
        dims = self.layout.dims(x.ndim)
        if self.observer == "percentile":
            lo, hi = percentile_range(x, self.percentile, dims)
        elif self.observer == "mse":
            lo, hi = mse_range(x, self.bits, self.symmetric, dims, narrow_range=self.narrow_range)
        else:
            lo, hi = minmax_range(x, dims)
        return (lo, hi) if self.layout.per_channel or self.layout.group_size else (lo.reshape(1), hi.reshape(1))

    def due(self) -> bool:
        """Activations are measured at every training batch, until ``freeze_after``."""
        if self.role == "weight":
            return not self.ready
        open_ = self.freeze_after is None or self.mode[0] < self.freeze_after
        return open_ and self.training and not self.paused

    def set_scales(self, x: Tensor) -> None:
        """Widens or moves the range of an activation by one batch."""
        if self.role == "weight":
            return
        lo, hi = self.range_of(x)
        lo, hi = -largest_over_ranks(-lo), largest_over_ranks(hi)
        if self.ready and self.observer == "ema":
            lo, hi = self.lo + self.ema * (lo - self.lo), self.hi + self.ema * (hi - self.hi)
        elif self.ready:
            lo, hi = torch.minimum(lo, self.lo), torch.maximum(hi, self.hi)
        self.lo.copy_(lo)
        self.hi.copy_(hi)

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Returns step, zero-point and code range for an arranged tensor."""
        lo, hi = self.range_of(x.detach()) if self.role == "weight" else (self.lo, self.hi)
        return affine_parameters(lo, hi, self.bits, self.symmetric, self.narrow_range)

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`fake_quant`."""
        return fake_quant(x, *self.parameters_of(x))

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and zero-point."""
        s, z, _, _ = self.parameters_of(x)
        return s, None if self.symmetric else z
