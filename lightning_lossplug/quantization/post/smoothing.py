"""SmoothQuant, AWQ and Outlier Suppression+: which scales and shifts make channels easier to quantise."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import Layout, check_bits, check_range
from lightning_lossplug.quantization.observers import affine_parameters, fake_quant
from lightning_lossplug.quantization.post.migrate import Group, Migration
from lightning_lossplug.registry import register


def smoothquant(input_max: Tensor, weight_max: Tensor, alpha: float = 0.5) -> Tensor:
    r"""Returns :math:`s_c = \max|X_c|^\alpha / \max|W_c|^{1-\alpha}`; inputs are divided by it, weights multiplied.

    Args:
        input_max: Largest magnitude of each input channel, ``[channels]``.
        weight_max: Largest magnitude of the weights of each channel, over all layers that read it.
        alpha: 0 flattens the weights, 1 the inputs.

    Raises:
        LossplugError: alpha outside [0, 1].

    Source: Xiao et al., SmoothQuant, arXiv 2211.10438.
    """
    check_range("smoothquant", "alpha", alpha, 0, 1)
    return (input_max.clamp_min(1e-5).pow(alpha) / weight_max.clamp_min(1e-5).pow(1 - alpha)).clamp_min(1e-5)


def os_plus_shift(low: Tensor, high: Tensor) -> Tensor:
    """Returns the middle of each channel's range, which is subtracted from it."""
    return (low + high) / 2


def os_plus_scale(high: Tensor, low: Tensor, t: float) -> Tensor:
    """Returns the divisors that bring shifted channels into [-t, t], 1 for those that are there already."""
    return torch.maximum(high / t, -low / t).clamp_min(1.0)


def os_plus(
    x: Tensor, weights: list[Tensor], bits_a: int = 8, bits_w: int = 8, n_steps: int = 100, t_min: float = 1.0
) -> tuple[Tensor, float]:
    r"""Returns the divisors with the least output error of quantised linear layers, and the threshold t behind them.

    t goes from :math:`\max|X|` to ``t_min`` in equal steps, at least two per unit; for each,
    :math:`s_c = \max(1, \max X_c/t, -\min X_c/t)` and the error is that of
    :math:`Q(X/s)\,Q(W s)^T` against :math:`X W^T`, summed over the layers: inputs on [-t, t] per tensor, weights
    symmetric per row.

    Args:
        x: Shifted inputs ``[tokens, channels]``.
        weights: ``[out, channels]`` each.
        bits_a: Bits of the inputs, 2 to 8.
        bits_w: Bits of the weights, 2 to 8.
        n_steps: Least number of thresholds.
        t_min: Smallest threshold; where it is above ``max|X|`` nothing is scaled.

    Raises:
        LossplugError: A value out of range.

    Source: Wei et al., Outlier Suppression+, arXiv 2304.09145.
    """
    bits_a, bits_w = check_bits("os_plus", bits_a, 2, 8), check_bits("os_plus", bits_w, 2, 8)
    check_range("os_plus", "n_steps", n_steps, 1)
    check_range("os_plus", "t_min", t_min, 1e-12)
    top = float(x.abs().max())
    best = (torch.ones(x.shape[1], dtype=x.dtype, device=x.device), top)
    if t_min > top:
        return best
    high, low, wants = x.amax(0), x.amin(0), [x @ w.T for w in weights]
    least, steps = torch.inf, max(n_steps, int(top / 0.5))
    for i in range(steps + 1):
        t = top + (t_min - top) * i / steps
        scale = os_plus_scale(high, low, t)
        edge = torch.full((1,), t, dtype=x.dtype, device=x.device)
        q = fake_quant(x / scale, *affine_parameters(-edge, edge, bits_a))
        error = 0.0
        for w, want in zip(weights, wants, strict=True):
            scaled = w * scale
            reach = scaled.abs().amax(1, keepdim=True)
            rounded = fake_quant(scaled, *affine_parameters(-reach, reach, bits_w, symmetric=True))
            error += float((q @ rounded.T - want).square().sum(1).mean())
        if error < least:
            least, best = error, (scale, t)
    return best


def awq(
    x: Tensor, weights: list[Tensor], bits: int = 4, group_size: int | None = 128, n_grid: int = 20
) -> tuple[Tensor, float]:
    r"""Returns the divisors with the least output error of quantised weights, and the exponent r behind them.

    :math:`s = \max(a^r, 10^{-4})` with :math:`a_c = \mathrm{mean}|x_c|`, divided by :math:`\sqrt{\max s \min s}`, for
    r = 0, 1/n ... ; weights are quantised as :math:`Q(W s)/s`, asymmetric in groups.

    Args:
        x: Inputs ``[tokens, channels]``.
        weights: ``[out, channels]`` each.
        bits: 2 to 8.
        group_size: Weights per group; None is a row.
        n_grid: Number of exponents.

    Raises:
        LossplugError: A value out of range, or groups that don't divide the channels.

    Source: Lin et al., AWQ, arXiv 2306.00978. The search for clipped groups that follows there is the ``mse`` start of
    the grid here.
    """
    bits = check_bits("awq", bits, 2, 8)
    check_range("awq", "n_grid", n_grid, 1)
    layout = Layout(group_size is None, group_size)
    for w in weights:
        layout.check(w.shape, "awq")
    mean, wants = x.abs().mean(0), [x @ w.T for w in weights]
    best, least, ratio = torch.ones_like(mean), torch.inf, 0.0
    for i in range(n_grid):
        s = mean.pow(i / n_grid).clamp_min(1e-4)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for w, want in zip(weights, wants, strict=True):
            wide = layout.arrange(w * s)
            dims = layout.dims(wide.ndim)
            grid = affine_parameters(wide.amin(dims, keepdim=True), wide.amax(dims, keepdim=True), bits)
            rounded = layout.restore(fake_quant(wide, *grid), w.shape) / s
            error += float((x @ rounded.T - want).square().mean())
        if error < least:
            best, least, ratio = s, error, i / n_grid
    return best, ratio


@register(
    "post_training",
    "smoothquant",
    family="migration",
    paper="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    arxiv="2211.10438",
)
class SmoothQuant(Migration):
    """Shares the range of outlier channels between inputs and weights; see :func:`smoothquant`.

    Args:
        alpha: 0 flattens the weights, 1 the inputs.

    Raises:
        LossplugError: alpha outside [0, 1].
    """

    name: ClassVar[str] = "smoothquant"

    def __init__(self, alpha: float = 0.5) -> None:
        check_range(self.name, "alpha", alpha, 0, 1)
        self.alpha = alpha

    def solve(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """Takes the largest magnitudes over all batches and layers."""
        tops = torch.stack([x.abs().amax(0) for x in group.inputs]).amax(0)
        weights = torch.stack([w.abs().amax(0) for w in group.weights()]).amax(0)
        return smoothquant(tops, weights, self.alpha), None


@register(
    "post_training",
    "awq",
    family="migration",
    paper="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    arxiv="2306.00978",
)
class AWQ(Migration):
    """Scales up the weights that large inputs meet, before weights alone are quantised; see :func:`awq`.

    Args:
        bits: 2 to 8.
        group_size: Weights per group; None is a row.
        n_grid: Number of exponents tried.
        tokens: Calibration tokens used, at most.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "awq"

    def __init__(self, bits: int = 4, group_size: int | None = None, n_grid: int = 20, tokens: int = 2048) -> None:
        self.bits = check_bits(self.name, bits, 2, 8)
        check_range(self.name, "n_grid", n_grid, 1)
        check_range(self.name, "tokens", tokens, 1)
        self.group_size, self.n_grid, self.tokens = group_size, n_grid, tokens

    def solve(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """Searches on tokens spread over the batches."""
        x = _spread(group.inputs, self.tokens)
        return awq(x, group.weights(), self.bits, self.group_size, self.n_grid)[0], None


@register(
    "post_training",
    "os_plus",
    family="migration",
    paper="Outlier Suppression+: Accurate quantization of large language models by equivalent transformations",
    arxiv="2304.09145",
)
class OSPlus(Migration):
    """Centres and scales channels by the output error of the quantised layers; see :func:`os_plus`.

    Where the norm or a linear layer has no bias (RMSNorm), a shift can't be folded and channels are scaled only. All
    layers behind a norm are judged by their own outputs, not by that of the attention they feed.

    Args:
        bits_a: Bits of the inputs.
        bits_w: Bits of the weights.
        n_steps: Least number of thresholds tried.
        t_min: Smallest threshold.
        tokens: Calibration tokens used, at most.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "os_plus"

    def __init__(
        self, bits_a: int = 8, bits_w: int = 8, n_steps: int = 100, t_min: float = 1.0, tokens: int = 2048
    ) -> None:
        self.bits_a, self.bits_w = check_bits(self.name, bits_a, 2, 8), check_bits(self.name, bits_w, 2, 8)
        for name, value, least in (("n_steps", n_steps, 1), ("t_min", t_min, 1e-12), ("tokens", tokens, 1)):
            check_range(self.name, name, value, least)
        self.n_steps, self.t_min, self.tokens = n_steps, t_min, tokens

    def solve(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """Shifts by the range over all batches, then searches on tokens spread over them."""
        shift = None
        x = _spread(group.inputs, self.tokens)
        if group.can_shift:
            low = torch.stack([x.amin(0) for x in group.inputs]).amin(0)
            high = torch.stack([x.amax(0) for x in group.inputs]).amax(0)
            shift = os_plus_shift(low, high)
            x = x - shift
        return os_plus(x, group.weights(), self.bits_a, self.bits_w, self.n_steps, self.t_min)[0], shift


def _spread(inputs: list[Tensor], tokens: int) -> Tensor:
    x = torch.cat(inputs)
    if not len(x):
        raise LossplugError("there are no calibration tokens", where="migrate_outliers")
    return x[torch.linspace(0, len(x) - 1, min(tokens, len(x)), device=x.device).long()]
