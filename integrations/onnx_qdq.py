"""Quantised models as ONNX files with QuantizeLinear and DequantizeLinear, run once more in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export.onnx_file import OnnxCheck, export_onnx
from lightning_lossplug.quantization.integer import integer_layer
from lightning_lossplug.quantization.integer_layer import IntegerLayer
from lightning_lossplug.surgery.attention import attending_layers, unplug_attention
from lightning_lossplug.surgery.plug import plugged_layers


def export_onnx_qdq(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    dynamic: Mapping[str, Sequence[int]] | None = None,
    tolerance: float = 0.02,
) -> OnnxCheck:
    """Writes a QAT model as ONNX: int8 weights behind DequantizeLinear, inputs through QuantizeLinear and back.

    Codes and scales are those of the trained model; weights of fewer bits travel as int8 codes, inputs of fewer bits
    are clipped where their codes end. ONNX Runtime and TensorRT turn such pairs into integer products where they have
    them. The outputs are compared with torch's in ONNX Runtime; a value between two codes may go either way. Attention
    whose operands were quantised in training is exported in floating point.

    Args:
        model: With layers whose weights and inputs are quantised; called as ``model(**inputs)``.
        inputs: Example tensors by argument name, in the order of the arguments.
        path: The file.
        dynamic: Axes of each input that may vary in length.
        tolerance: Largest allowed difference, relative to the largest output (absolute below 1).

    Raises:
        LossplugError: A package is missing, nothing is quantised, a quantised layer has no integer form, or what
            :func:`lightning_lossplug.export.export_onnx` refuses.
    """
    twin = copy.deepcopy(model).cpu().float().eval()
    layers = list(plugged_layers(twin))
    if not layers:
        raise LossplugError("the model has no quantised layer", where="export_onnx_qdq", remedy="Train it with QAT")
    for _, module in list(attending_layers(twin)):
        unplug_attention(module)
    for name, layer in layers:
        found = integer_layer(layer, name, "reference")
        if isinstance(found, IntegerLayer) and found.dynamic:
            found = "its input has a step per token, and QuantizeLinear has one for all"
        if isinstance(found, str):
            raise LossplugError(
                found, where=name, remedy="Exclude the layer in training, or fold the model for export_onnx"
            )
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, _QDQLayer(found))
    return export_onnx(twin, inputs, path, dynamic=dynamic, tolerance=tolerance)


class _QDQLayer(nn.Module):
    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.layer = layer
        # Signed codes are int8, unsigned ones uint8, so that 0 keeps its trained code.
        signed = layer.bounds[0] < 0
        kind = torch.int8 if signed else torch.uint8
        self.register_buffer("zero", torch.tensor(layer.input_zero, dtype=kind))
        self.register_buffer("weight_zero", torch.zeros(len(layer.weight_scale), dtype=torch.int8))
        ends = torch.iinfo(kind)
        step = float(layer.input_scale)
        values = [(end - layer.input_zero) * step for end in layer.bounds]
        self.clip = None if layer.bounds == (ends.min, ends.max) else values

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return self.layer(x)
        layer = self.layer
        step, zero = layer.input_scale, self.zero
        if self.clip is not None:
            x = x.clamp(*self.clip)
        q = _operator("QuantizeLinear", (x, step, zero), {}, zero.dtype, x)  # type: ignore[arg-type, union-attr]
        x = _operator("DequantizeLinear", (q, step, zero), {}, torch.float32, x)  # type: ignore[arg-type]
        inputs = (layer.codes, layer.weight_scale, self.weight_zero)
        w = _operator("DequantizeLinear", inputs, {"axis": 0}, torch.float32, layer.codes)  # type: ignore[arg-type]
        if layer.convolution is None:
            return F.linear(x, w, layer.bias)
        convolve: Any = {2: F.conv1d, 3: F.conv2d}[layer.codes.ndim - 1]
        return convolve(x, w, layer.bias, **layer.convolution)


def _operator(
    name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], dtype: torch.dtype, like: Tensor
) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=like.shape, version=18)
