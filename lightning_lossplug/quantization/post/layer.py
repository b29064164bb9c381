"""What a post-training method sees of a layer: its weight, its grid, its inputs, and what it should compute."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.affine import Affine
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.surgery.plug import WeightTransform, plain_class, transforms_name


class _Given(WeightTransform):
    """Stands in for the quantiser while a method tries weights."""

    stage: ClassVar[str] = "quantization"

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.dtype)


@dataclass
class LayerProblem:
    """One layer to be quantised.

    Args:
        name: Path of the layer, with the parameter's name where that isn't ``weight``.
        layer: The plugged layer.
        parameter: Name of the parameter.
        axis: Axis of the outputs.
        weight: The float weight, float32.
        quantizer: The quantiser of the weight, its grid set.
        inputs: Inputs of the calibration batches, as the quantised model gives them.
        targets: Outputs of the float model for the same batches.
        tail: What follows the layer directly (a norm in eval mode, an activation): errors are measured behind it.
        activation: Quantiser of the input, or None.
        generator: Random numbers of the method.
        raw_inputs: Inputs before the quantiser of the input.
    """

    name: str
    layer: nn.Module
    parameter: str
    axis: int
    weight: Tensor
    quantizer: Quantizer
    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    tail: tuple[nn.Module, ...] = ()
    activation: Quantizer | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    raw_inputs: list[Tensor] = field(default_factory=list)
    _pool: tuple[list[Tensor], Tensor, Tensor] | None = None

    @property
    def affine(self) -> Affine:
        """The quantiser, which has to be an integer grid.

        Raises:
            LossplugError: It has none.
        """
        if not isinstance(self.quantizer, Affine):
            raise LossplugError(
                f"the method needs an integer grid, {self.quantizer.name} has none",
                where=self.name,
                remedy="Use method='rtn' with it, or weight='affine'",
            )
        return self.quantizer

    def rounded(self) -> Tensor:
        """Returns the weight rounded to nearest."""
        self.quantizer.eval()
        with torch.no_grad():
            return self.quantizer(self.weight)

    @contextmanager
    def weights(self, value: Tensor) -> Iterator[nn.Module]:
        """Within the context the layer computes with ``value``."""
        stack: Any = self.layer._modules[transforms_name(self.parameter)]
        before = stack["quantization"]
        # past __setitem__, so that the quantiser keeps its place and its hooks
        stack._modules["quantization"] = _Given(value)
        try:
            yield self.layer
        finally:
            stack._modules["quantization"] = before

    def product(self, x: Tensor, value: Tensor, tail: bool = True) -> Tensor:
        """Returns the layer's output for one input with other weights, behind its tail."""
        with self.weights(value) as layer:
            # past __call__: x is quantised already
            y = layer.forward(x)
        for module in self.tail if tail else ():
            y = module(y)
        return y

    @torch.no_grad()
    def error(self, value: Tensor) -> float:
        """Returns the relative squared error of the outputs with a weight, over all batches."""
        wrong = total = 0.0
        for x, y in zip(self.inputs, self.targets, strict=True):
            wrong += float((self.product(x, value) - y).square().sum(dtype=torch.float64))
            total += float(y.square().sum(dtype=torch.float64))
        return wrong / max(total, 1e-30)

    def draw(self, batch: int, inputs: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``batch`` random samples of inputs (or of others in their place) and targets.

        Where batches differ in shape (texts of several lengths), it is one of the batches.
        """
        inputs = self.inputs if inputs is None else inputs
        if len({x.shape[1:] for x in inputs}) > 1:
            i = int(torch.randint(len(inputs), (1,), generator=self.generator))
            return inputs[i], self.targets[i]
        if self._pool is None or self._pool[0] is not inputs:
            self._pool = (inputs, torch.cat(inputs), torch.cat(self.targets))
        _, x, y = self._pool
        index = torch.randperm(len(x), generator=self.generator)[:batch].to(x.device)
        return x[index], y[index]

    @functools.cached_property
    def nearest_error(self) -> float:
        """:meth:`error` of the weight rounded to nearest, on the grid and inputs of the first time it is asked for."""
        return self.error(self.rounded())

    def matrix(self, value: Tensor) -> Tensor:
        """Returns a weight as rows of outputs and columns of what is summed over: ``[out, columns]``."""
        return value.movedim(self.axis, 0).flatten(1)

    def from_matrix(self, rows: Tensor) -> Tensor:
        """Undoes :meth:`matrix`."""
        rest = [size for i, size in enumerate(self.weight.shape) if i != self.axis]
        return rows.reshape(self.weight.shape[self.axis], *rest).movedim(0, self.axis)

    @torch.no_grad()
    def moments(self) -> Tensor:
        """Returns the sums of x x^T over all inputs, ``[groups, columns, columns]`` in float64.

        Raises:
            LossplugError: A layer whose product isn't one of columns (three spatial axes, padding by its own rule).
        """
        total: Tensor | None = None
        for x in self.inputs:
            columns = self._columns(x.float())
            # float32 within a batch, float64 over batches: products are long, batches few
            part = torch.einsum("gnc,gnd->gcd", columns, columns).double()
            total = part if total is None else total + part
        if total is None:
            raise LossplugError("no calibration batch reached it", where=self.name, remedy="Exclude it")
        return total

    def _columns(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if not issubclass(plain_class(layer), (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return x.reshape(1, -1, x.shape[-1])
        if isinstance(layer, nn.Conv3d) or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise LossplugError("its inputs can't be laid out as columns", where=self.name, remedy="Exclude it")
        out = self.product(x[:1], self.weight, tail=False)
        line = self.weight.ndim == 3
        if "Same" in plain_class(layer).__name__:
            x = _pad_same(x, layer)

        def pair(value: tuple[int, ...], spare: int) -> tuple[int, ...]:
            return (spare, *value) if line else tuple(value)

        cut = F.unfold(
            x.unsqueeze(2) if line else x,
            pair(layer.kernel_size, 1),
            pair(layer.dilation, 1),
            pair(layer.padding, 0),
            pair(layer.stride, 1),
        )
        if cut.shape[-1] != math.prod(out.shape[2:]):
            raise LossplugError("it pads its inputs by a rule of its own", where=self.name, remedy="Exclude it")
        cut = cut.reshape(len(x), layer.groups, -1, cut.shape[-1])
        return cut.permute(1, 0, 3, 2).reshape(layer.groups, -1, cut.shape[2])


def _pad_same(x: Tensor, layer: Any) -> Tensor:
    """Pads as timm's convolutions with TensorFlow's rule do, which have no padding of their own."""
    pads: list[int] = []
    for size, k, stride, dilation in zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True):
        need = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        pads = [need // 2, need - need // 2, *pads]
    return F.pad(x, pads)
