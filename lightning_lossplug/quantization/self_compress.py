"""Learned bit depths: each channel has an exponent and a number of bits, and pays for its bits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import Role, check_bits, check_range
from lightning_lossplug.registry import register


def self_compress(w: Tensor, e: Tensor, b: Tensor) -> Tensor:
    r"""Quantises to :math:`2^e\,\mathrm{round}(\mathrm{clip}(2^{-e} w, -2^{b-1}, 2^{b-1}-1))` with real e and b >= 0.

    The rounding is straight-through: w gets g inside the range; e gets :math:`\ln 2\,g\,(\hat w - w)` inside and
    :math:`\ln 2\,g\,\hat w` beyond; b gets :math:`\pm\ln 2\;2^{b-1}\,2^e g` at the upper and lower end. b = 0 gives 0.

    Args:
        w: Weights.
        e: Exponents that broadcast against ``w``.
        b: Bits, shaped as ``e``; below 0 they act as 0, without a gradient, so such a channel stays off.

    Source: Cséfalvay and Imber, Self-Compressing Neural Networks, arXiv 2301.13142.
    """
    half, unit = torch.exp2(b.relu() - 1), torch.exp2(e)
    v = torch.minimum(torch.maximum(w / unit, -half), half - 1)
    return unit * (v + (v.round() - v).detach())


@register(
    "quantizer",
    "self_compress",
    family="learned bits",
    paper="Self-Compressing Neural Networks",
    arxiv="2301.13142",
    roles=("weight",),
)
class SelfCompress(Quantizer):
    r"""Weights whose channels learn their bits under the size penalty :math:`\gamma Q`; see :func:`self_compress`.

    Q is the number of bits over all weights divided by the number of weights; its gradient joins b's before the step.
    Channels that reach 0 bits are zero; removing them is another technique.

    Args:
        bits: Bits at the start, 1 to 16.
        gamma: Strength of the penalty, >= 0.
        e_init: Exponent at the start; None covers the largest weight of the channel.
        axis: Axis of the channels.
        role: ``weight``.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "self_compress"
    scales: ClassVar[dict[str, float]] = {"e": -8.0, "b": 8.0}

    e: Tensor
    b: Tensor

    def __init__(
        self, bits: int = 8, gamma: float = 0.015, e_init: float | None = None, axis: int = 0, role: Role = "weight"
    ) -> None:
        super().__init__(True, None, axis, role)
        self.bits = check_bits(self.name, bits, 1, 16)
        check_range(self.name, "gamma", gamma, 0)
        self.gamma, self.e_init = gamma, e_init
        self.own_weights = self.total_weights = 1  # of this tensor and of all that share the penalty

    def set_scales(self, x: Tensor) -> None:
        """Sets the bits and the exponents."""
        self.own_weights = x.numel()
        self.total_weights = max(self.total_weights, x.numel())
        self.b.data.fill_(self.bits)
        if self.e_init is not None:
            self.e.data.fill_(self.e_init)
        else:
            top = x.abs().amax(self.layout.dims(x.ndim), keepdim=True).clamp_min(1e-12)
            self.e.data.copy_(torch.log2(top) - (self.bits - 1))

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`self_compress`."""
        return self_compress(x, self.e, self.b)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The step :math:`2^e`."""
        return torch.exp2(self.e.detach()), None

    @torch.no_grad()
    def add_gradients(self, grad_scale: float = 1.0) -> None:
        """Adds the gradient of the size penalty to that of the bits."""
        if self.b.grad is not None:
            per_bit = self.own_weights / self.b.numel() / self.total_weights
            self.b.grad.add_((self.b > 0).to(self.b), alpha=self.gamma * per_bit * grad_scale)
