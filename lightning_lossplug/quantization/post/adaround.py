"""AdaRound: whether a weight is rounded up or down is learned from what the layer computes."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_range
from lightning_lossplug.quantization.post.layer import LayerProblem
from lightning_lossplug.quantization.post.method import PostTrainingMethod
from lightning_lossplug.registry import register


def rectified_sigmoid(v: Tensor) -> Tensor:
    r"""Returns :math:`h(V) = \mathrm{clip}(1.2\,\sigma(V) - 0.1, 0, 1)`, which reaches 0 and 1."""
    return (v.sigmoid() * 1.2 - 0.1).clamp(0, 1)


def adaround_init(w: Tensor, s: Tensor) -> Tensor:
    r"""Returns V with :math:`h(V) = w/s - \lfloor w/s \rfloor`, so that the soft weight starts as ``w``."""
    fraction = w / s - (w / s).floor()
    return -(1.2 / (fraction + 0.1) - 1).log()


def adaround(
    w: Tensor, v: Tensor, s: Tensor, z: Tensor | None = None, low: int = -7, high: int = 7, hard: bool = False
) -> Tensor:
    r"""Returns :math:`s\,(\mathrm{clip}(\lfloor w/s \rfloor + h(V) + z, low, high) - z)`.

    Args:
        w: Float weights.
        v: Rounding variables, shaped as ``w``.
        s: Steps that broadcast against ``w``.
        z: Zero-points; None is 0.
        low: Least code.
        high: Largest code.
        hard: Round up where V >= 0 and down elsewhere, instead of by h(V).

    Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, arXiv 2004.10568.
    """
    z = torch.zeros_like(s) if z is None else z
    up = (v >= 0).to(w.dtype) if hard else rectified_sigmoid(v)
    return ((((w / s).floor() + up + z).clamp(low, high)) - z) * s


def adaround_regularizer(v: Tensor, beta: float) -> Tensor:
    r"""Returns :math:`\sum 1 - |2h(V) - 1|^\beta`, which is 0 when every h is 0 or 1."""
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def adaround_beta(fraction: float, beta: tuple[float, float] = (20.0, 2.0), warmup: float = 0.2) -> float:
    """Returns the power at a fraction of the run: the first value during ``warmup``, then linear to the second."""
    if fraction < warmup:
        return beta[0]
    return beta[0] + (beta[1] - beta[0]) * (fraction - warmup) / (1 - warmup)


@register(
    "post_training",
    "adaround",
    family="rounding",
    paper="Up or Down? Adaptive Rounding for Post-Training Quantization",
    arxiv="2004.10568",
)
class AdaRound(PostTrainingMethod):
    r"""Learns the rounding of each weight by :math:`\mathrm{mean}\sum_c|y-\hat y|^p + \lambda\sum 1-|2h(V)-1|^\beta`.

    y is what the float model computes there, behind the norm and activation that follow directly; the inputs come from
    the quantised model. Where the result is worse on the calibration data than rounding to nearest, the latter stays.

    Args:
        iters: Steps of Adam, >= 0.
        lr: Learning rate.
        lambda_: Strength of the regulariser, a sum over the layer's weights.
        beta: Its power at the start and at the end, >= 1.
        warmup: Share of the steps without it, in [0, 1).
        batch: Samples per step.
        p: Power of the error.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "adaround"
    needs_float_model: ClassVar[bool] = True

    def __init__(
        self,
        iters: int = 10000,
        lr: float = 1e-3,
        lambda_: float = 0.01,
        beta: tuple[float, float] = (20.0, 2.0),
        warmup: float = 0.2,
        batch: int = 32,
        p: float = 2.0,
    ) -> None:
        for name, value, least in (("iters", iters, 0), ("lr", lr, 0), ("lambda", lambda_, 0), ("batch", batch, 1)):
            check_range(self.name, name, value, least)
        if len(tuple(beta)) != 2 or min(beta) < 1:
            raise LossplugError(f"beta is {beta}, allowed are two numbers >= 1", where=self.name)
        if not 0 <= warmup < 1:
            raise LossplugError(f"warmup is {warmup}, allowed is [0, 1)", where=self.name)
        check_range(self.name, "p", p, 1)
        self.iters, self.lr, self.lambda_ = iters, lr, lambda_
        self.beta, self.warmup, self.batch, self.p = (float(beta[0]), float(beta[1])), warmup, batch, p

    def solve(self, problem: LayerProblem) -> Tensor:
        """Learns V, and compares with rounding to nearest."""
        quantizer = problem.affine
        layout, shape = quantizer.layout, problem.weight.shape
        w = layout.arrange(problem.weight)
        s, z, (low, high) = quantizer.s, quantizer.z, quantizer.bounds
        v = adaround_init(w, s).requires_grad_()
        optimizer = torch.optim.Adam([v], self.lr)
        channel = 1 if problem.weight.ndim > 2 else -1
        for step in range(self.iters):
            x, y = problem.draw(self.batch)
            fraction = step / self.iters
            with torch.enable_grad():
                soft = layout.restore(adaround(w, v, s, z, low, high), shape)
                loss = (problem.product(x, soft) - y).abs().pow(self.p).sum(channel).mean()
                if fraction >= self.warmup and self.lambda_:
                    beta = adaround_beta(fraction, self.beta, self.warmup)
                    loss = loss + self.lambda_ * adaround_regularizer(v, beta)
                (v.grad,) = torch.autograd.grad(loss, [v])
            if not math.isfinite(float(loss)):
                raise LossplugError("the reconstruction error is not finite", where=problem.name)
            optimizer.step()
        with torch.no_grad():
            learned = layout.restore(adaround(w, v, s, z, low, high, hard=True), shape)
            nearest = problem.rounded()
        return learned if problem.error(learned) < problem.nearest_error else nearest
