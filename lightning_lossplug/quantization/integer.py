"""Models in integers: weights as int8 codes, inputs quantised with the trained static steps, products in int32.

The product runs through PyTorch's oneDNN int8 operators where they exist and pass a test on the layer's own weights,
else as the same integers in float32. Those operators are what Inductor emits; they are not a documented interface,
hence the test and the fallback, and hence this one module around them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Codes, Quantizer
from lightning_lossplug.quantization.transform import QuantTransform
from lightning_lossplug.surgery.plug import INPUT, latent, plain_class, plugged_layers, transform_of

Backend = Literal["auto", "onednn", "reference"]


class IntegerLayer(nn.Module):
    """A linear layer or convolution on integers, equal to the fake-quantised layer up to float32 rounding.

    Args:
        codes: Weight codes, int8, in the layer's layout.
        weight_scale: [C_out], or [1] for all.
        bias: Float bias or None.
        bounds: Least and largest code of the input.
        input_scale: Step of the input.
        input_zero: Code of an input of 0.
        convolution: Stride, padding, dilation and groups; None is a linear layer.
    """

    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        bounds: tuple[int, int],
        input_scale: Tensor,
        input_zero: int = 0,
        convolution: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int8))
        scale = weight_scale.float().reshape(-1)
        self.register_buffer("weight_scale", scale.expand(codes.shape[0]).contiguous())
        self.register_buffer("input_scale", input_scale.float().reshape(()))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.bounds, self.input_zero, self.convolution = bounds, input_zero, convolution
        # The kernels take unsigned bytes: a signed code c travels as c - bounds[0].
        self.shift = -bounds[0] if bounds[0] < 0 else 0
        self.backend = "reference"
        self._step = float(self.input_scale)
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output, in the dtype of ``x``."""
        low, high = self.bounds
        q = (x.float() / self.input_scale).round_().add_(self.input_zero).clamp_(low, high)
        y = self._reference(q) if self._packed is None else self._fast((q + self.shift).to(torch.uint8))
        return y.to(x.dtype)

    def _reference(self, q: Tensor) -> Tensor:
        w, centred = self.codes.float(), q - self.input_zero
        scale = self.weight_scale * self.input_scale
        if self.convolution is None:
            y = F.linear(centred, w) * scale
            return y if self.bias is None else y + self.bias
        product = {2: F.conv1d, 3: F.conv2d}[self.codes.ndim - 1](centred, w, **self.convolution)
        shape = (-1, *[1] * (self.codes.ndim - 2))
        y = product * scale.reshape(shape)
        return y if self.bias is None else y + self.bias.reshape(shape)

    def _fast(self, q: Tensor) -> Tensor:
        ops, zero = torch.ops.onednn, self.input_zero + self.shift
        none = torch.zeros(len(self.weight_scale), dtype=torch.int32)
        after: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        if self.convolution is None:
            flat = q.reshape(-1, q.shape[-1])
            y = ops.qlinear_pointwise(flat, self._step, zero, self._packed, self.weight_scale, none, self.bias, *after)
            return y.reshape(*q.shape[:-1], -1)
        c = self.convolution
        q = q.contiguous(memory_format=torch.channels_last)
        return ops.qconv_pointwise(
            q,
            self._step,
            zero,
            self._packed,
            self.weight_scale,
            none,
            self.bias,
            c["stride"],
            c["padding"],
            c["dilation"],
            c["groups"],
            *after,
        )

    def use(self, backend: Backend) -> bool:
        """Chooses the kernel: ``onednn``, ``reference``, or ``auto`` (the first that passes the test).

        Returns:
            Whether the choice could be made.
        """
        self._packed, self.backend = None, "reference"
        if backend == "reference":
            return True
        if self.codes.device.type != "cpu" or (self.convolution is not None and self.codes.ndim != 4):
            return backend == "auto"
        try:
            self._step = float(self.input_scale)
            if self.convolution is None:
                self._packed = torch.ops.onednn.qlinear_prepack(self.codes, None)
            else:
                c = self.convolution
                self._packed = torch.ops.onednn.qconv_prepack(
                    self.codes,
                    self.weight_scale,
                    self._step,
                    self.input_zero + self.shift,
                    c["stride"],
                    c["padding"],
                    c["dilation"],
                    c["groups"],
                    None,
                )
            good = self._agrees()
        except (RuntimeError, AttributeError, NotImplementedError):  # not built in, or not for this shape or processor
            good = False
        if not good:
            self._packed = None
            return backend == "auto"
        self.backend = "onednn"
        return True

    def _agrees(self) -> bool:
        low, high = self.bounds
        generator = torch.Generator().manual_seed(0)
        shape = (3, self.codes.shape[1]) if self.convolution is None else (2, *self._input_shape())
        q = torch.randint(low, high + 1, shape, generator=generator).float()
        want, got = self._reference(q), self._fast((q + self.shift).to(torch.uint8))
        return bool((want - got).abs().max() <= 1e-5 * (want.max() - want.min()).clamp_min(1e-30))

    def _input_shape(self) -> tuple[int, ...]:
        assert self.convolution is not None
        reach = [d * (k - 1) + 3 for d, k in zip(self.convolution["dilation"], self.codes.shape[2:], strict=True)]
        return (self.codes.shape[1] * self.convolution["groups"], *reach)

    def __deepcopy__(self, memo: dict[int, Any]) -> IntegerLayer:
        twin = self._twin()
        twin.use(self.backend)  # type: ignore[arg-type]
        memo[id(self)] = twin
        return twin

    def _twin(self) -> IntegerLayer:
        return IntegerLayer(
            self.codes.clone(),
            self.weight_scale.clone(),
            self.bias,
            self.bounds,
            self.input_scale.clone(),
            self.input_zero,
            copy.copy(self.convolution),
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        args = (self.codes, self.weight_scale, self.bias, self.bounds, self.input_scale, self.input_zero)
        return _rebuild, (*args, self.convolution, self.backend)

    def extra_repr(self) -> str:
        """Shape, range of the input, kernel."""
        return f"{tuple(self.codes.shape)}, input {self.bounds}, backend={self.backend}"


def _rebuild(*args: Any) -> IntegerLayer:
    layer = IntegerLayer(*args[:-1])
    layer.use(args[-1])
    return layer


def quantizer_of(layer: nn.Module, parameter: str = "weight") -> Quantizer | None:
    """Returns the quantiser of a weight (or, with :data:`surgery.INPUT`, of the input), or None."""
    transform = transform_of(layer, "quantization", parameter)
    return transform.quantizer if isinstance(transform, QuantTransform) else None


def integer_layer(layer: nn.Module, where: str = "layer", backend: Backend = "auto") -> IntegerLayer | str:
    """Returns a plugged layer in integers, or why it has to stay in float.

    Args:
        layer: A plugged ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d`` with quantised weight and input.
        where: Its path, for messages.
        backend: ``auto``, ``onednn`` or ``reference``.

    Raises:
        LossplugError: Scales that were never set or are not above 0; a backend that can't compute the layer.
    """
    kind = plain_class(layer)
    weight, inputs = quantizer_of(layer), quantizer_of(layer, INPUT)
    if not issubclass(kind, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return f"{kind.__name__} has no integer form"
    if weight is None or inputs is None:
        return "its weight or input is not quantised"
    if weight.layout.group_size:
        return "its weights have groups, which the int8 product can't scale"
    if getattr(layer, "padding_mode", "zeros") != "zeros" or isinstance(getattr(layer, "padding", 0), str):
        return "its padding is not a number of zeros"
    for quantizer in (weight, inputs):
        quantizer.check_ready()
        if not quantizer.has_codes:
            return f"{quantizer.name} has no integer codes"
    step, zero = inputs.grid(latent(layer).new_zeros(1))
    coded = weight_codes(layer, weight)
    if coded.zero_point is not None and bool((coded.zero_point != 0).any()):
        return "its weights have a zero-point"
    if int(coded.codes.min()) < -128 or int(coded.codes.max()) > 127:
        return "its weight codes are wider than int8"
    point = 0 if zero is None else int(zero)
    low, high = _input_bounds(inputs)
    if high - low > 255:
        return "its input codes are wider than a byte"
    convolution = None
    if not issubclass(kind, nn.Linear):
        names = ("stride", "padding", "dilation", "groups")
        convolution = {n: v if isinstance(v := getattr(layer, n), int) else list(v) for n in names}
    made = IntegerLayer(coded.codes, coded.scale, layer.bias, (low, high), step, point, convolution)  # type: ignore[arg-type]
    if not made.use(backend):
        raise LossplugError("the onednn int8 kernel can't compute this layer here", where=where, remedy="Use 'auto'")
    return made


@torch.no_grad()
def weight_codes(layer: nn.Module, weight: Quantizer, parameter: str = "weight") -> Codes:
    """Returns the codes of a plugged weight, after the stages before quantisation."""
    value: Tensor = latent(layer, parameter).detach()
    for stage in ("structure", "sparsity"):
        transform = transform_of(layer, stage, parameter)
        value = value if transform is None else transform(value)
    return weight.quantize(value)


def _input_bounds(quantizer: Quantizer) -> tuple[int, int]:
    bounds = getattr(quantizer, "bounds", None)
    if bounds is not None:
        return bounds
    lo, hi = (quantizer.quantize(torch.tensor([end])).codes.item() for end in (-1e30, 1e30))
    return int(lo), int(hi)


def integer_model(model: nn.Module, *, backend: Backend = "auto") -> tuple[nn.Module, dict[str, str]]:
    """Returns a copy of a QAT model with its quantised layers in integers.

    The copy is in eval mode and computes what the QAT model computes in eval mode: each layer up to float32 rounding
    (1e-5 of its output's range), which in a deep model may move a value that lies between two codes to the other one.
    Layers without an integer form stay as they are, fake-quantised.

    Args:
        model: A module with plugged layers, on the CPU for the fast kernels.
        backend: ``auto``, ``onednn`` (an error where it can't) or ``reference``.

    Returns:
        The model, and ``{path: reason}`` for the layers that stay.

    Raises:
        LossplugError: No layer could be converted; scales that were never set or are not above 0.
    """
    made: dict[str, IntegerLayer] = {}
    left: dict[str, str] = {}
    for name, layer in plugged_layers(model):
        found = integer_layer(layer, name, backend)
        if isinstance(found, str):
            left[name] = found
        else:
            made[name] = found
    if not made:
        why = next(iter(left.items()), ("the model", "it has no quantised layer"))
        raise LossplugError(f"no layer can be put in integers: {why[1]}", where=why[0])
    twin = copy.deepcopy(model)
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, layer)
    return twin.eval(), left
