"""Binary vision transformers: attention above a share of the row's largest, centred signs with a learned scale."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.binary import sign
from lightning_lossplug.quantization.grid import Role, sum_like
from lightning_lossplug.registry import register


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, ratio: float) -> Tensor:
        ctx.save_for_backward(scores)
        p = scores.softmax(-1)
        return (p >= ratio * p.amax(-1, keepdim=True)).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * (ctx.saved_tensors[0].abs() < 1), None


def bivit_attention(scores: Tensor, attn_ratio: float = 0.25) -> Tensor:
    r"""Returns binary attention :math:`1[p \ge r \max_{row} p]` of the softmax p; the gradient is g where |score| < 1.

    Rows aren't normalised: scale what they are multiplied with, or the output grows with the number of tokens. Masks
    belong into the scores.

    Args:
        scores: Attention scores, the softmax over the last axis.
        attn_ratio: r in (0, 1].

    Raises:
        LossplugError: A ratio out of range.

    Source: He et al., BiViT, arXiv 2211.07091.
    """
    if not 0 < attn_ratio <= 1:
        raise LossplugError(f"attn_ratio is {attn_ratio}, allowed is (0, 1]", where="bivit")
    return _Attention.apply(scores, float(attn_ratio))


class _Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return alpha * sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        g = grads[0]
        return g * alpha * (x.abs() < 1), sum_like(g * sign(x), alpha)


def bivit(w: Tensor, alpha: Tensor, axis: int = 0) -> Tensor:
    r"""Returns :math:`\alpha\,\mathrm{sign}(w - \mathrm{mean}_{row} w)` (sign(0) = 1).

    The sign passes gradients where its argument lies in (-1, 1); the mean is differentiated, alpha gets its own.

    Args:
        w: Weights, a row being everything at one index of ``axis``.
        alpha: Scales that broadcast against ``w``.
        axis: Axis of the rows.

    Source: He et al., BiViT, arXiv 2211.07091.
    """
    dims = [i for i in range(w.ndim) if i != axis % w.ndim]
    return _Signs.apply(w - w.mean(dims, keepdim=True), alpha)


@register(
    "quantizer",
    "bivit",
    family="low-bit",
    paper="BiViT: Extremely Compressed Binary Vision Transformer",
    arxiv="2211.07091",
    roles=("weight", "activation"),
)
class BiViT(Quantizer):
    """Centred signs with a scale per output channel; activations are plain signs; see :func:`bivit`.

    The binary attention of the paper is :func:`bivit_attention`, for the attention's own code. Its phases, in which
    attention and MLP become binary one after the other, are two runs with other ``include``.

    Args:
        learn_scale: Train the scales of the weights.
        axis: Axis of the output channels.
        role: ``weight`` or ``activation``.
    """

    name: ClassVar[str] = "bivit"
    scales: ClassVar[dict[str, float]] = {"alpha": 1.0}
    positive: tuple[str, ...] = ("alpha",)
    bits = 1

    alpha: Tensor

    def __init__(self, learn_scale: bool = True, axis: int = 0, role: Role = "weight") -> None:
        super().__init__(role == "weight", None, axis, role)
        self.alpha.requires_grad_(learn_scale and role == "weight")

    @property
    def has_zero(self) -> bool:
        """Signs are never 0."""
        return False

    def set_scales(self, x: Tensor) -> None:
        """Mean magnitude of each channel; 1 for activations."""
        if self.role == "weight":
            self.alpha.data.copy_(x.abs().mean(self.layout.dims(x.ndim), keepdim=True).clamp_min(1e-5))

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`bivit`."""
        return bivit(x, self.alpha, self.layout.axis) if self.role == "weight" else _Signs.apply(x, self.alpha)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The channel's scale."""
        return self.alpha.detach(), None
