"""UDFC: what a removed or quantised channel carried is given to the others in the next layer, without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_range
from lightning_lossplug.registry import register


def udfc_coefficients(
    kept: Tensor, kept_bias: Tensor, lost: Tensor, lost_bias: Tensor, alpha1: float = 0.01, alpha2: float = 0.008
) -> Tensor:
    r"""Returns the coefficients with which a channel is best written as a sum of others.

    They minimise :math:`\|V_j - \sum s_i V_i\|^2 + \alpha_1 (b_j - \sum s_i b_i)^2 + \alpha_2 \|s\|^2`.

    Closed form: :math:`(A^T A + \alpha_1 b b^T + \alpha_2 I)^{-1}(A^T V_j + \alpha_1 b_j b)`.

    Args:
        kept: Filters of the others behind the norm, ``[channels, weights]``: :math:`V_i = \gamma_i/\sigma_i\,W_i`.
        kept_bias: Their biases, :math:`b_i = \beta_i - \gamma_i\mu_i/\sigma_i`.
        lost: Filter of the channel, ``[weights]``.
        lost_bias: Its bias.
        alpha1: Weight of the biases, >= 0.
        alpha2: Ridge, >= 0.

    Raises:
        LossplugError: A negative weight.

    Source: Bai et al., Unified Data-Free Compression, arXiv 2308.07209. Its text was not at hand: this is the least
    squares that its assumption leads to, and no parity is claimed.
    """
    check_range("udfc", "alpha1", alpha1, 0)
    check_range("udfc", "alpha2", alpha2, 0)
    kept, kept_bias = kept.double(), kept_bias.double()
    eye = torch.eye(len(kept), dtype=torch.float64, device=kept.device)
    left = kept @ kept.T + alpha1 * torch.outer(kept_bias, kept_bias) + alpha2 * eye
    right = kept @ lost.double() + alpha1 * lost_bias.double() * kept_bias
    if alpha2 > 0:
        return torch.linalg.solve(left, right).to(lost.dtype)
    return (torch.linalg.pinv(left, hermitian=True) @ right).to(lost.dtype)


def udfc_rescale(lost: Tensor, quantized: Tensor, alpha2: float = 0.0) -> Tensor:
    r"""Returns the factor of each quantised channel: :math:`\langle V, \hat V\rangle/(\|\hat V\|^2 + \alpha_2)`.

    Args:
        lost: Filters ``[channels, weights]``.
        quantized: Their quantised values.
        alpha2: Ridge, >= 0.
    """
    return (lost * quantized).sum(1) / (quantized.square().sum(1) + alpha2).clamp_min(1e-12)


@register(
    "function",
    "udfc",
    family="data-free",
    paper="Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning",
    arxiv="2308.07209",
)
@torch.no_grad()
def udfc_prune(
    layer: nn.Module,
    norm: nn.Module | None,
    following: nn.Module,
    removed: list[int],
    alpha1: float = 0.01,
    alpha2: float = 0.008,
) -> dict[int, Tensor]:
    """Sets output channels of a layer to zero and gives their share to the others, in the next layer, in place.

    Exact where a removed channel is a positive sum of others and the activation in between is ReLU; the channels stay
    in the tensors as zeros, for a structured export to take out.

    Args:
        layer: A convolution or linear layer.
        norm: The BatchNorm behind it, or None.
        following: The layer that reads the channels, without groups.
        removed: Output channels.
        alpha1: Weight of the biases.
        alpha2: Ridge.

    Returns:
        ``{removed channel: coefficients of the kept ones}``.

    Raises:
        LossplugError: Channels that aren't there, none left, or layers whose widths don't fit.
    """
    one: Any = layer
    after: Any = following
    width = one.weight.shape[0]
    gone = sorted(set(removed))
    if gone and (gone[0] < 0 or gone[-1] >= width or len(gone) == width):
        raise LossplugError(f"removed is {removed}, the layer has {width} channels", where="udfc")
    if after.weight.shape[1] != width or getattr(after, "groups", 1) != 1:
        raise LossplugError(
            f"the next layer reads {after.weight.shape[1]} channels of {width}",
            where="udfc",
            remedy="Give its consumer",
        )
    bias = torch.zeros(width).to(one.weight) if one.bias is None else one.bias
    scale = torch.ones_like(bias)
    if norm is not None:
        inner: Any = norm
        scale = inner.weight / (inner.running_var + inner.eps).sqrt()
        bias = inner.bias + (bias - inner.running_mean) * scale
    filters = one.weight.flatten(1) * scale[:, None]
    kept = [i for i in range(width) if i not in gone]
    found = {}
    for j in gone:
        s = udfc_coefficients(filters[kept], bias[kept], filters[j], bias[j], alpha1, alpha2)
        column = after.weight[:, j : j + 1]
        shape = [1, -1, *[1] * (after.weight.ndim - 2)]
        after.weight[:, kept] += column * s.reshape(shape)
        found[j] = s
    for parameter in (one.weight, one.bias, *((norm.weight, norm.bias) if norm is not None else ())):
        if parameter is not None:
            parameter[gone] = 0
    if norm is not None:
        norm.running_mean[gone] = 0  # type: ignore[index, operator]
    after.weight[:, gone] = 0
    return found
