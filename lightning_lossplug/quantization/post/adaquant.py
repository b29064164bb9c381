"""AdaQuant: weights, bias and ranges of a layer are trained against what it computed in float."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_range
from lightning_lossplug.quantization.observers import FakeQuant
from lightning_lossplug.quantization.post.layer import LayerProblem
from lightning_lossplug.quantization.post.method import PostTrainingMethod
from lightning_lossplug.registry import register


def _straight(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def adaquant(x: Tensor, r: Tensor, o: Tensor, bits: int = 4) -> Tensor:
    r"""Quantises on a learned range R from a learned offset O; every rounding is straight-through.

    :math:`s = \mathrm{clip}(R, 10^{-6}, 10^5)/(2^b-1)`, :math:`z = \mathrm{clip}(\mathrm{round}(-O/s), 0, 2^b-1)`,
    :math:`\hat x = s\,(\mathrm{round}(\mathrm{clip}(x/s + z, 0, 2^b-1)) - z)`.

    Args:
        x: Any shape.
        r: Range > 0, broadcasting against ``x``.
        o: Least value of the range.
        bits: 2 to 8.

    Source: Hubara et al., arXiv 2006.10518.
    """
    top = 2**bits - 1
    s = r.clamp(1e-6, 1e5) / top
    z = _straight(-o / s).clamp(0, top)
    return s * (_straight((x / s + z).clamp(0, top)) - z)


@register(
    "post_training",
    "adaquant",
    family="rounding",
    paper="Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
    arxiv="2006.10518",
)
class AdaQuant(PostTrainingMethod):
    """Trains a layer's weight, bias, and the ranges of weight and input on its output error; see :func:`adaquant`.

    With symmetric weights (the default, which int8 products need) the zero-point stays 0 and the range is learned;
    ``weight_options={"symmetric": False}`` is the paper's grid. Input ranges are learned with the quantiser
    ``fake_quant``, asymmetric. Where the trained layer is worse on the calibration data than rounding to nearest, the
    latter stays.

    Args:
        iters: Steps of Adam, >= 0.
        lr_w: Learning rate of the weight.
        lr_b: Of the bias.
        lr_qw: Of the weight's range.
        lr_qa: Of the input's range.
        batch: Samples per step.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "adaquant"
    needs_float_model: ClassVar[bool] = True

    def __init__(
        self,
        iters: int = 1000,
        lr_w: float = 1e-5,
        lr_b: float = 1e-3,
        lr_qw: float = 1e-3,
        lr_qa: float = 1e-1,
        batch: int = 50,
    ) -> None:
        for name, value in (("iters", iters), ("lr_w", lr_w), ("lr_b", lr_b), ("lr_qw", lr_qw), ("lr_qa", lr_qa)):
            check_range(self.name, name, value, 0)
        check_range(self.name, "batch", batch, 1)
        self.iters, self.batch = iters, batch
        self.lr_w, self.lr_b, self.lr_qw, self.lr_qa = lr_w, lr_b, lr_qw, lr_qa

    def solve(self, problem: LayerProblem) -> Tensor:
        """Trains, and compares with rounding to nearest."""
        bias = getattr(problem.layer, "bias", None)
        bias = bias if isinstance(bias, nn.Parameter) else None
        before = (
            problem.inputs,
            None if bias is None else bias.detach().clone(),
            bias is not None and bias.requires_grad,
        )
        nearest = problem.rounded()
        plain = problem.nearest_error
        weight = _Weight(problem)
        ranges = problem.activation
        inputs = _Input(ranges) if isinstance(ranges, FakeQuant) and not ranges.symmetric else None
        try:
            self._train(problem, weight, inputs, bias)
        finally:
            if bias is not None:
                bias.requires_grad_(before[2])
                bias.grad = None
        if inputs is not None:
            inputs.write()
            problem.inputs = [inputs.ranges(x) for x in problem.raw_inputs]
        grid = (weight.affine.s.clone(), weight.affine.z.clone())
        value = weight.write()
        if problem.error(value) < plain:
            return value
        weight.affine.set_grid(*grid)
        problem.inputs = before[0]
        if inputs is not None:
            inputs.restore()
        if bias is not None and before[1] is not None:
            bias.data.copy_(before[1])
        return nearest

    def _train(self, problem: LayerProblem, weight: _Weight, inputs: _Input | None, bias: nn.Parameter | None) -> None:
        groups: list[tuple[list[Tensor], float]] = [([weight.w], self.lr_w), (weight.ranges, self.lr_qw)]
        if bias is not None:
            groups.append(([bias.requires_grad_(True)], self.lr_b))
        if inputs is not None:
            groups.append(([inputs.r, inputs.o], self.lr_qa))
        optimizer = torch.optim.Adam([{"params": params, "lr": lr} for params, lr in groups])
        trained = [parameter for params, _ in groups for parameter in params]
        source = problem.inputs if inputs is None else problem.raw_inputs
        for _ in range(self.iters):
            x, y = problem.draw(self.batch, source)
            with torch.enable_grad():
                x = x if inputs is None else adaquant(x, inputs.r, inputs.o, inputs.ranges.bits)
                loss = (problem.product(x, weight.value()) - y).square().mean()
                grads = torch.autograd.grad(loss, trained)
            if not math.isfinite(float(loss)):
                raise LossplugError("the reconstruction error is not finite", where=problem.name)
            for parameter, grad in zip(trained, grads, strict=True):
                parameter.grad = grad
            optimizer.step()


class _Weight:
    """A weight and its range while they are trained."""

    def __init__(self, problem: LayerProblem) -> None:
        self.affine, self.shape = problem.affine, problem.weight.shape
        self.w = problem.weight.clone().requires_grad_()
        low, high = self.affine.bounds
        self.width = high - low
        self.r = (self.affine.s * self.width).requires_grad_()
        self.o = (-self.affine.s * self.affine.z).requires_grad_()

    @property
    def ranges(self) -> list[Tensor]:
        return [self.r] if self.affine.symmetric else [self.r, self.o]

    def value(self) -> Tensor:
        wide = self.affine.layout.arrange(self.w)
        if self.affine.symmetric:
            s, (low, high) = self.r.clamp(1e-6, 1e5) / self.width, self.affine.bounds
            return self.affine.layout.restore(_straight((wide / s).clamp(low, high)) * s, self.shape)
        return self.affine.layout.restore(adaquant(wide, self.r, self.o, self.affine.bits), self.shape)

    @torch.no_grad()
    def write(self) -> Tensor:
        """Moves the grid, and returns the weight on it."""
        s = self.r.clamp(1e-6, 1e5) / self.width
        z = torch.zeros_like(s) if self.affine.symmetric else (-self.o / s).round().clamp(0, self.width)
        self.affine.set_grid(s, z)
        return self.affine(self.w)


class _Input:
    """The range of an input while it is trained."""

    def __init__(self, ranges: FakeQuant) -> None:
        self.ranges = ranges
        self.before = (ranges.lo.clone(), ranges.hi.clone())
        low, high = ranges.lo.clamp_max(0), ranges.hi.clamp_min(0)
        self.r, self.o = (high - low).clone().requires_grad_(), low.clone().requires_grad_()

    @torch.no_grad()
    def write(self) -> None:
        top = 2**self.ranges.bits - 1
        s = self.r.clamp(1e-6, 1e5) / top
        z = (-self.o / s).round().clamp(0, top)
        self.ranges.lo.copy_(-z * s)
        self.ranges.hi.copy_((top - z) * s)

    def restore(self) -> None:
        self.ranges.lo.copy_(self.before[0])
        self.ranges.hi.copy_(self.before[1])
