"""L^2 compression: a dead zone and a grid per tensor, and a differentiable count of the bits of its coded file."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.quantization.grid import check_choice, check_range
from lightning_lossplug.registry import register

Kernel = Literal["cos", "lin", "tri"]


def l2_encode(w: Tensor, e: Tensor, s: Tensor) -> Tensor:
    r"""Returns real codes: :math:`w/2e` for :math:`|w| \le e`, else :math:`\mathrm{sign}(w)(1/2 + (|w| - e)/s)`.

    Args:
        w: Weights.
        e: Half-width of the dead zone, > 0.
        s: Step outside of it, > 0.
    """
    return torch.where(w.abs() <= e, w / (2 * e), w.sign() * (0.5 + (w.abs() - e) / s))


def l2_decode(q: Tensor, e: Tensor, s: Tensor) -> Tensor:
    r"""Undoes :func:`l2_encode`: :math:`2eq` for :math:`|q| \le 1/2`, else :math:`\mathrm{sign}(q)(e + (|q|-1/2)s)`."""
    return torch.where(q.abs() <= 0.5, q * 2 * e, q.sign() * (e + (q.abs() - 0.5) * s))


def l2_round(w: Tensor, e: Tensor, s: Tensor) -> Tensor:
    """Returns the values of the rounded codes, with straight-through gradients for ``w``, ``e`` and ``s``."""
    c = l2_encode(w, e, s)
    return l2_decode(c + (c.round() - c).detach(), e, s)


def _soft_step(u: Tensor, kernel: str) -> Tensor:
    inner = u.clamp(-1, 1)
    if kernel == "cos":
        return 0.5 - 0.5 * ((inner + 1) * (math.pi / 2)).cos()
    if kernel == "lin":
        return (inner + 1) / 2
    return torch.where(inner < 0, (inner + 1).square() / 2, 1 - (1 - inner).square() / 2)


@register(
    "function",
    "l2_compression",
    family="size",
    paper="Lossy and Lossless (L2) Post-training Model Size Compression",
    arxiv="2308.04269",
)
def l2_bits(
    c: Tensor, resolution: int = 64, kernel: Kernel = "cos", generator: torch.Generator | None = None
) -> Tensor:
    r"""Returns the bits of a tensor under entropy coding of its rounded codes, differentiable in the codes.

    :math:`n\,\mathrm{mean}_i[-\log_2 (F(q_i + 1/2) - F(q_i - 1/2))/n]` with the soft distribution
    :math:`F(t) = \sum_j k((t - c_j)/D)`, :math:`D = (\max c - \min c)/resolution` and :math:`q = \mathrm{round}(c)`,
    straight through. As the resolution grows it becomes n times the entropy of q.

    Args:
        c: Real codes, as :func:`l2_encode` gives them.
        resolution: Kernels over the range of the codes, >= 1.
        kernel: The soft step: ``cos``, ``lin`` or ``tri`` (of a triangular density).
        generator: Of the subset: of more than 128^2 codes a random 128th (at least 128^2) is counted.

    Raises:
        LossplugError: A value out of range.

    Source: Shi et al., Lossy and Lossless (L2) Post-training Model Size Compression, arXiv 2308.04269.
    """
    check_choice("l2_compression", "kernel", kernel, ("cos", "lin", "tri"))
    check_range("l2_compression", "resolution", resolution, 1)
    flat = c.flatten()
    n = flat.numel()
    if n > 128**2:
        keep = torch.randperm(n, generator=generator)[: max(n // 128, 128**2)].to(flat.device)
        flat = flat[keep]
    width = ((flat.max() - flat.min()) / resolution).detach().clamp_min(1e-12)
    q = flat + (flat.round() - flat).detach()
    symbols, where, counts = q.detach().unique(return_inverse=True, return_counts=True)
    # every code of a symbol moves the symbol's edges by its share, so that each gets its own gradient
    moved = torch.zeros_like(symbols).index_add(0, where, (q - q.detach()) / counts[where].to(q))
    centre = symbols + moved

    def below(t: Tensor) -> Tensor:
        return torch.stack([_soft_step((each - flat) / width, kernel).sum() for each in t])

    mass = below(centre + 0.5) - below(centre - 0.5)
    bits = -(mass.clamp_min(1e-30) / flat.numel()).log2() * counts
    return bits[mass > 0].sum() * (n / flat.numel())


def entropy_bits(q: Tensor) -> float:
    """Returns n times the entropy of whole codes in bits: what an ideal coder takes without its table."""
    counts = q.flatten().unique(return_counts=True)[1].double()
    p = counts / counts.sum()
    return float(-(counts * p.log2()).sum())
