"""DenseShift: weights that are signed powers of two and never zero, from a sign and several switches per weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.binary import sign
from lightning_lossplug.quantization.grid import Role, check_bits, check_range
from lightning_lossplug.registry import register


def _exponents(t: Tensor) -> list[Tensor]:
    """Returns S_0 = 0 and S_1 ... S_T: S_j = (S_{j-1} + 1) H(t_j)."""
    found = [torch.zeros_like(t[0])]
    for switch in t:
        found.append((found[-1] + 1) * (switch > 0))
    return found


class _DenseShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(u, t)
        return sign(u) * torch.exp2(_exponents(t)[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, t = ctx.saved_tensors
        s = _exponents(t)
        root = (s[-1] + 1).sqrt()
        du, ds = grads[0] * root, grads[0] * sign(u) / (2 * root)
        dt = torch.empty_like(t)
        for j in range(len(t) - 1, -1, -1):
            dt[j] = ds * (s[j] + 1)
            ds = ds * (t[j] > 0)
        return du, dt


def denseshift(u: Tensor, t: Tensor | Sequence[Tensor]) -> Tensor:
    r"""Returns :math:`\mathrm{sgn}(u)\,2^{S_T}`, :math:`S_1 = H(t_1)`, :math:`S_j = (S_{j-1} + 1)\,H(t_j)`.

    H(0) = 0 and sgn(0) = 1. Gradients are those of :math:`\mathrm{sgn}(u)\sqrt{S_T + 1}` with both steps passed
    straight through: :math:`du = g\sqrt{S+1}`, :math:`dS = g\,\mathrm{sgn}(u)/(2\sqrt{S+1})`, and on through the
    recursion.

    Args:
        u: Latent signs.
        t: The T switches, ``[T, *u.shape]`` or a sequence: 1, 3 or 7 for 2, 3 or 4 bits.

    Source: Li et al., DenseShift, arXiv 2208.09708.
    """
    return _DenseShift.apply(u, t if isinstance(t, Tensor) else torch.stack(list(t)))


@register(
    "quantizer",
    "denseshift",
    family="low-bit",
    paper="DenseShift: Towards Accurate and Efficient Low-Bit Power-of-Two Quantization",
    arxiv="2208.09708",
    roles=("weight",),
)
class DenseShift(Quantizer):
    """Weights that are signed powers of two, times a scale per output channel; see :func:`denseshift`.

    The layer's own weight is the latent sign; the switches are parameters here, ``2**(bits-1) - 1`` times as many. They
    start at small random numbers (the paper's low variance), whose signs give the power nearest to the trained weight.

    Args:
        bits: 2, 3 or 4.
        init_std: Standard deviation of the switches at the start, > 0.
        channel_scale: Train a scale per channel; without it (a norm follows) the scale stays as it was set.
        axis: Axis of the output channels.
        role: ``weight``.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "denseshift"
    scales: ClassVar[dict[str, float]] = {"alpha": 1.0}
    positive: tuple[str, ...] = ("alpha",)

    alpha: Tensor

    def __init__(
        self,
        bits: int = 3,
        init_std: float = 1e-3,
        channel_scale: bool = True,
        axis: int = 0,
        role: Role = "weight",
    ) -> None:
        super().__init__(True, None, axis, role)
        self.bits = check_bits(self.name, bits, 2, 4)
        check_range(self.name, "init_std", init_std, 1e-12)
        self.switches, self.init_std = 2 ** (self.bits - 1) - 1, init_std
        self.alpha.requires_grad_(channel_scale)
        self.t = nn.Parameter(torch.zeros(self.switches, 1))

    @property
    def has_zero(self) -> bool:
        """Powers of two are never 0."""
        return False

    @property
    def has_codes(self) -> bool:
        """Codes up to 2^7 on both sides don't fit a byte."""
        return self.bits < 4

    def set_scales(self, x: Tensor) -> None:
        """The largest weight of a channel is its largest power."""
        top = x.abs().amax(self.layout.dims(x.ndim), keepdim=True).clamp_min(1e-12)
        alpha = top / 2**self.switches
        self.alpha.data.copy_(alpha)
        power = (x.abs() / alpha).clamp_min(1).log2().round().clamp(0, self.switches)
        # S_T counts the switches that are on at the end of the row
        place = torch.arange(self.switches, device=x.device).reshape(-1, *[1] * x.ndim)
        on = place >= self.switches - power
        generator = torch.Generator().manual_seed(x.numel())  # the same on every process
        size = torch.randn(on.shape, generator=generator).to(x).abs().clamp_min(1e-3) * self.init_std
        self.t.data = torch.where(on, size, -size).to(torch.float32)

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`denseshift`."""
        if self.t.shape[1:] != x.shape:
            raise LossplugError(
                f"its switches are of a weight of shape {tuple(self.t.shape[1:])}, this one is {tuple(x.shape)}",
                where=self.where,
            )
        return denseshift(x, self.t.to(x.dtype)) * self.alpha

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The channel's scale; codes are the signed powers."""
        return self.alpha.detach(), None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "t")
        if isinstance(saved, Tensor) and saved.shape != self.t.shape and not self.ready:
            self.t.data = torch.empty(saved.shape, dtype=self.t.dtype, device=self.t.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
