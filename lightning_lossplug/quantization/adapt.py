"""AdaPT's pieces: fixed-point numbers with stochastic rounding, and word lengths that follow weights and gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_choice, check_range
from lightning_lossplug.registry import register

STRATEGIES = ("min", "mean", "max")


def _check(wl: int, fl: int) -> None:
    if wl < 2 or fl > wl or fl < 0:
        raise LossplugError(
            f"word length {wl}, fraction {fl}: allowed is >= 2, and 0 to the word length", where="adapt"
        )


@register(
    "function",
    "adapt",
    family="learned bits",
    paper="Adaptive Precision Training: Quantify Back and Forth during Training with Fixed Point Numbers",
    arxiv="2107.13490",
)
def adapt(x: Tensor, wl: int, fl: int, stochastic: bool = True, generator: torch.Generator | None = None) -> Tensor:
    r"""Rounds to fixed point with ``wl`` bits, ``fl`` of them behind the point; the gradient is g inside the range.

    Stochastic rounding goes up with the probability of the fraction, so it is right on average inside the range. With
    :func:`push_down` and :func:`push_up` it makes up the method; the constants of the paper were not at hand, so the
    loop that switches word lengths in training is not here and no parity is claimed.

    Args:
        x: Any shape.
        wl: Word length, >= 2.
        fl: Fraction bits, 0 to ``wl``.
        stochastic: Round at random, else to nearest.
        generator: Of the random numbers.

    Raises:
        LossplugError: Lengths out of range.
    """
    _check(wl, fl)
    step, top = 2.0**-fl, 2 ** (wl - 1) - 1
    v = x / step
    if stochastic:
        chance = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        whole = (v.detach() + chance).floor()
    else:
        whole = v.detach().round()
    inside = v.clamp(-top - 1, top)
    return (inside + (whole.clamp(-top - 1, top) - inside).detach()) * step


def _distance(w: Tensor, q: Tensor, bins: int) -> float:
    low, high = float(w.min()), float(w.max())
    if high <= low:
        return 0.0
    p, r = (torch.histc(v.float(), bins, low, high) + 1e-6 for v in (w, q))  # empty bins would be infinitely far
    p, r = p / p.sum(), r / r.sum()
    return float((p * (p / r).log()).sum())


def push_down(w: Tensor, resolution: int = 100, tolerance: float = 1e-2, fl_max: int = 32) -> int:
    """Returns the least fraction length whose rounded weights are distributed like the weights.

    Args:
        w: Weights.
        resolution: Bins of the two histograms, >= 2.
        tolerance: Largest Kullback-Leibler divergence that counts as none, >= 0.
        fl_max: Largest fraction length.

    Raises:
        LossplugError: A value out of range.
    """
    check_range("adapt", "resolution", resolution, 2)
    check_range("adapt", "tolerance", tolerance, 0)
    whole = integer_bits(w)
    for fl in range(fl_max + 1):
        if _distance(w, adapt(w, whole + fl + 1, fl, stochastic=False), resolution) <= tolerance:
            return fl
    return fl_max


def integer_bits(w: Tensor) -> int:
    """Returns the bits in front of the point that hold the largest weight, with its sign."""
    return max(math.ceil(math.log2(float(w.abs().max()) + 1e-12) + 1e-9), 0) + 1


def gradient_diversity(gradients: Tensor) -> float:
    r"""Returns :math:`\sum_k \|g_k\|^2 / \|\sum_k g_k\|^2`: 1/k for k equal gradients, 1 for orthogonal ones.

    Args:
        gradients: ``[k, ...]`` of a window of steps.
    """
    flat = gradients.flatten(1).double()
    return float(flat.square().sum() / flat.sum(0).square().sum().clamp_min(1e-300))


def push_up(fl: int, diversity: float, strategy: str = "mean", fl_max: int = 32) -> int:
    r"""Returns the fraction length after a look at the gradients: longer while they agree.

    With :math:`s_1 = \max(\lceil 1/(\log \Delta + 1) \rceil, 1)` and :math:`s_2 = fl_{max} - fl` bits as suggestions,
    the rise is the smaller (``min``), the rounded mean (``mean``) or the larger (``max``) one, where
    :math:`\log\Delta < 0`; else nothing changes. The form of the suggestions is this project's.

    Args:
        fl: Fraction length.
        diversity: Of :func:`gradient_diversity`, > 0.
        strategy: ``min``, ``mean`` or ``max``.
        fl_max: Largest fraction length.

    Raises:
        LossplugError: An unknown strategy, or a diversity that isn't above 0.
    """
    check_choice("adapt", "strategy", strategy, STRATEGIES)
    if not diversity > 0:
        raise LossplugError(f"diversity is {diversity}, allowed is above 0", where="adapt")
    if math.log(diversity) >= 0:
        return fl
    slow = max(math.ceil(1 / (1 - math.log(diversity))), 1)
    fast = max(fl_max - fl, 0)
    rise = {"min": min(slow, fast), "mean": round((slow + fast) / 2), "max": max(slow, fast)}[strategy]
    return min(fl + rise, fl_max)
