"""Interval bound propagation: what a network can output when its input moves within a box.

The network is traced with ``torch.fx``, so plain modules with skip connections work as they are. Bounds are those of
arithmetic without rounding errors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_lossplug.errors import LossplugError

Channels = float | Sequence[float] | Tensor


class Box(NamedTuple):
    """Bounds and the value at one point of the box: clean input, or an attack.

    Args:
        lower: Lower bounds.
        upper: Upper bounds.
        point: Activations at the point; batch normalisation takes its statistics from it in training mode.
    """

    lower: Tensor
    upper: Tensor
    point: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of each of the three."""
        return self.point.shape


def per_channel(value: Channels, x: Tensor) -> Tensor:
    """Returns a number, or one number per channel, so that it broadcasts against ``x`` [N, C, *]."""
    t = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return t.reshape(-1, *[1] * (x.ndim - 2)) if t.ndim == 1 and t.numel() > 1 else t


def input_box(
    x: Tensor, eps: Channels, low: Channels | None = None, high: Channels | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the bounds ``x - eps`` and ``x + eps``, clipped to the range of the data.

    Args:
        x: Inputs [N, C, *], as the model gets them.
        eps: Radius in that unit: divide by the standard deviations of the normalisation; a number or one per channel.
        low: Smallest possible input, in the same unit; None: no limit.
        high: Largest possible input.
    """
    lower, upper = x - per_channel(eps, x), x + per_channel(eps, x)
    if low is not None:
        lower = torch.maximum(lower, per_channel(low, x).expand_as(lower))
    if high is not None:
        upper = torch.minimum(upper, per_channel(high, x).expand_as(upper))
    return lower, upper


def _affine(box: Box, apply: Callable[[Tensor, bool], Tensor]) -> Box:
    """Propagates through ``apply(x, absolute)``: the affine map, or its linear part with absolute weights."""
    center = apply((box.lower + box.upper) / 2, False)
    radius = apply((box.upper - box.lower) / 2, True)
    return Box(center - radius, center + radius, apply(box.point, False))


def _each(box: Box, apply: Callable[[Tensor], Tensor]) -> Box:
    """Propagates through a map that is non-decreasing in every input."""
    return Box(apply(box.lower), apply(box.upper), apply(box.point))


@singledispatch
def propagate(layer: nn.Module, box: Box) -> Box:
    """Returns the bounds after a layer; register a function here to support another type."""
    raise LossplugError(
        f"interval bounds don't know {type(layer).__name__}",
        remedy="Known: linear, convolution, batch norm, pooling, flatten, dropout, monotone activations; register "
        "others with lightning_lossplug.losses.interval.propagate.register",
    )


@propagate.register
def _(layer: nn.Linear, box: Box) -> Box:
    return _affine(box, lambda x, a: F.linear(x, layer.weight.abs()) if a else F.linear(x, layer.weight, layer.bias))


@propagate.register
def _(layer: _ConvNd, box: Box) -> Box:
    if layer.transposed or not hasattr(layer, "_conv_forward"):
        raise LossplugError("interval bounds don't know transposed convolutions")
    forward: Any = layer._conv_forward
    return _affine(box, lambda x, a: forward(x, layer.weight.abs() if a else layer.weight, None if a else layer.bias))


@propagate.register
def _(layer: _BatchNorm, box: Box) -> Box:
    dims = [0, *range(2, box.point.ndim)]
    if layer.training or layer.running_mean is None or layer.running_var is None:
        # The statistics are those of the point, and the layer itself moves its running averages once.
        point = layer(box.point)
        mean, var = box.point.mean(dims), box.point.var(dims, unbiased=False)
    else:
        mean, var = layer.running_mean, layer.running_var
        point = layer(box.point)
    scale = torch.rsqrt(var + layer.eps)
    scale = scale if layer.weight is None else scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    shape = (-1, *[1] * (box.point.ndim - 2))
    scale, shift = scale.reshape(shape), shift.reshape(shape)
    center, radius = (box.lower + box.upper) / 2 * scale + shift, (box.upper - box.lower) / 2 * scale.abs()
    return Box(center - radius, center + radius, point)


@propagate.register(nn.ReLU)
@propagate.register(nn.ReLU6)
@propagate.register(nn.Hardtanh)
@propagate.register(nn.ELU)
@propagate.register(nn.Sigmoid)
@propagate.register(nn.Tanh)
@propagate.register(nn.Softplus)
@propagate.register(nn.Identity)
@propagate.register(nn.Flatten)
@propagate.register(nn.Unflatten)
@propagate.register(nn.AvgPool1d)
@propagate.register(nn.AvgPool2d)
@propagate.register(nn.MaxPool1d)
@propagate.register(nn.MaxPool2d)
@propagate.register(nn.AdaptiveAvgPool1d)
@propagate.register(nn.AdaptiveAvgPool2d)
@propagate.register(nn.AdaptiveMaxPool2d)
def _(layer: nn.Module, box: Box) -> Box:
    if getattr(layer, "inplace", False):  # would overwrite what the other bounds still need
        return _each(box, lambda x: layer(x.clone()))
    return _each(box, layer)


@propagate.register
def _(layer: nn.LeakyReLU, box: Box) -> Box:
    if layer.negative_slope < 0:
        raise LossplugError(f"LeakyReLU with slope {layer.negative_slope} is not monotone")
    return _each(box, lambda x: F.leaky_relu(x, layer.negative_slope))


@propagate.register(nn.Dropout)
@propagate.register(nn.Dropout2d)
def _(layer: nn.Dropout, box: Box) -> Box:
    if layer.training and layer.p > 0:
        raise LossplugError("dropout is active, so the bounds would hold for no single network", remedy="Set p to 0")
    return box


_MONOTONE_FUNCTIONS = {
    torch.relu, F.relu, F.relu6, F.hardtanh, F.elu, torch.sigmoid, torch.tanh, F.softplus, torch.flatten, torch.mean,
    torch.squeeze, torch.reshape, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, torch.max_pool2d,
}  # fmt: skip
_MONOTONE_METHODS = {
    "flatten",
    "view",
    "reshape",
    "relu",
    "sigmoid",
    "tanh",
    "mean",
    "squeeze",
    "unsqueeze",
    "contiguous",
}


def _functions(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    boxes = [a for a in args if isinstance(a, Box)]
    if not boxes:
        items = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        if function is torch.cat and any(isinstance(i, Box) for i in items):
            parts = [i if isinstance(i, Box) else Box(i, i, i) for i in items]
            return Box(*(torch.cat(leg, *args[1:], **kwargs) for leg in zip(*parts, strict=True)))
        return function(*args, **kwargs)
    if function is getattr:
        return getattr(*args)
    if function in (operator.add, operator.iadd, torch.add) and not kwargs:
        legs = [a if isinstance(a, Box) else Box(a, a, a) for a in args]
        return Box(*(one + two for one, two in zip(*legs, strict=True)))
    if function in (operator.sub, torch.sub) and not kwargs:
        (al, au, ap), (bl, bu, bp) = (a if isinstance(a, Box) else Box(a, a, a) for a in args)
        return Box(al - bu, au - bl, ap - bp)
    if function in (operator.mul, torch.mul, operator.truediv) and isinstance(args[0], Box) != isinstance(args[1], Box):
        box, other = args if isinstance(args[0], Box) else (args[1], args[0])
        if function is not operator.truediv or isinstance(args[0], Box):
            ends = function(box.lower, other), function(box.upper, other)
            return Box(torch.minimum(*ends), torch.maximum(*ends), function(box.point, other))
    if function in _MONOTONE_FUNCTIONS and len(boxes) == 1 and isinstance(args[0], Box):
        rest = {k: v for k, v in kwargs.items() if k != "inplace"}
        return _each(args[0], lambda x: function(x, *args[1:], **rest))
    name = getattr(function, "__name__", str(function))
    raise LossplugError(
        f"interval bounds don't know the function {name}", remedy="Put it in a module and register that"
    )


def has_rule(layer: nn.Module) -> bool:
    """Whether :func:`propagate` knows the type of a layer."""
    return propagate.dispatch(type(layer)) is not propagate.dispatch(nn.Module)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return has_rule(m) or super().is_leaf_module(m, module_qualified_name)


class _Interpreter(torch.fx.Interpreter):
    """Runs a traced network on boxes and keeps what enters a last linear layer."""

    last: tuple[nn.Linear, Box] | None = None

    def run_node(self, n: torch.fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except LossplugError as error:
            raise LossplugError(error.what, where=error.where or str(n.target), remedy=error.remedy) from None
        if n.op == "call_module":
            layer = self.submodules[str(n.target)]
            is_output = len(n.users) == 1 and next(iter(n.users)).op == "output"
            if isinstance(layer, nn.Linear) and is_output:
                self.last = layer, self.env[n.args[0]]  # type: ignore[index]
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Box):
            return super().call_module(target, args, kwargs)
        if len(args) + len(kwargs) > 1:
            raise LossplugError("interval bounds need layers of one input")
        return propagate(self.submodules[str(target)], args[0])

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _functions(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        box = args[0]
        if not isinstance(box, Box):
            return super().call_method(target, args, kwargs)
        if target in ("size", "dim"):
            return getattr(box.point, target)(*args[1:], **kwargs)
        if target == "add" and len(args) == 2:
            return _functions(operator.add, args, kwargs)
        if target not in _MONOTONE_METHODS:
            raise LossplugError(
                f"interval bounds don't know the method {target}", remedy="Put it in a module and register that"
            )
        return _each(box, lambda x: getattr(x, target)(*args[1:], **kwargs))


def _run(
    model: nn.Module, lower: Tensor, upper: Tensor, point: Tensor | None
) -> tuple[Box, tuple[nn.Linear, Box] | None]:
    if lower.shape != upper.shape or (point is not None and point.shape != lower.shape):
        raise LossplugError("lower, upper and point have to have one shape", where="interval bounds")
    box = Box(lower, upper, (lower + upper) / 2 if point is None else point)
    where = type(model).__name__
    if has_rule(model):  # a tracer looks inside the outermost module, whatever it is
        model = nn.Sequential(model)
    try:
        interpreter = _Interpreter(torch.fx.GraphModule(model, _Tracer().trace(model)))
    except (torch.fx.proxy.TraceError, TypeError) as error:
        raise LossplugError(
            f"the network can't be traced: {error}",
            where=where,
            remedy="Give the plain network, without control flow on data",
        ) from error
    interpreter.extra_traceback = False  # it would append lines of its own to our errors
    interpreter.submodules = dict(interpreter.module.named_modules())  # type: ignore[assignment]
    out = interpreter.run(box)
    if not isinstance(out, Box):
        raise LossplugError(f"the network returns {type(out).__name__}, expected one tensor", where=where)
    return out, interpreter.last


def interval_bounds(model: nn.Module, lower: Tensor, upper: Tensor, point: Tensor | None = None) -> Box:
    """Returns bounds of the outputs of a network for all inputs between ``lower`` and ``upper``.

    Known layers: linear, convolution, batch norm (with the statistics of ``point`` in training mode), average and max
    pooling, flatten, inactive dropout, monotone activations, sums, differences and concatenations, products with
    constants.

    Args:
        model: A network that ``torch.fx`` can trace, of one input and one output.
        lower: Lower bounds of the input.
        upper: Upper bounds of the input.
        point: A point within; None: the centre.

    Raises:
        LossplugError: A layer or function without a rule, or a network that can't be traced.
    """
    return _run(model, lower, upper, point)[0]


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """Returns ``z_y - z_k`` for the classes k other than y, [N, C-1], of logits [N, C]."""
    return logits.gather(1, y[:, None]) - logits.gather(1, other_classes(y, logits.shape[1]))


def other_classes(y: Tensor, classes: int) -> Tensor:
    """Returns the classes other than y in ascending order, [N, C-1]."""
    k = torch.arange(classes - 1, device=y.device)
    return k + (k >= y[:, None])


def margin_bounds(
    model: nn.Module, lower: Tensor, upper: Tensor, y: Tensor, point: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns lower bounds of the margins ``z_y - z_k`` over the box, and the margins at the point, both [N, C-1].

    A last linear layer is merged with the difference, which is never looser than bounding the two logits apart.

    Args:
        model: See :func:`interval_bounds`; its output is logits [N, C].
        lower: Lower bounds of the input [N, *].
        upper: Upper bounds of the input.
        y: Class indices [N].
        point: A point within the box; None: the centre.

    Raises:
        LossplugError: The network has no interval bounds, or the labels don't fit.
    """
    out, last = _run(model, lower, upper, point)
    classes = out.shape[-1]
    if len(out.shape) != 2 or y.shape != out.shape[:1] or y.is_floating_point():
        raise LossplugError(
            f"labels {tuple(y.shape)} ({y.dtype}) for outputs {tuple(out.shape)}", where="margin_bounds"
        )
    clean = margins(out.point, y)
    others = other_classes(y, classes)
    if last is None:
        return out.lower.gather(1, y[:, None]) - out.upper.gather(1, others), clean
    layer, box = last
    rows = layer.weight[y][:, None] - layer.weight[others]
    center, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    bound = torch.einsum("nkd,nd->nk", rows, center) - torch.einsum("nkd,nd->nk", rows.abs(), radius)
    return bound if layer.bias is None else bound + layer.bias[y][:, None] - layer.bias[others], clean
