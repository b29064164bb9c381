"""A folded model as an ONNX file, run once more in ONNX Runtime before it counts as written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.surgery.plug import plugged_layers

_INLINE_BYTES = 1_500_000_000  # a protobuf file ends at 2 GB; above this, weights go into a second file


@dataclass(frozen=True)
class OnnxCheck:
    """What was found when an ONNX file was read back.

    Args:
        max_difference: Largest distance of an output of ONNX Runtime (CPU) from torch's.
        tolerance: What was allowed.
        opset: Version of the operators.
        zeros: Exact zeros in the file's matrices.
        bytes: Size of the file (and of its second one).
    """

    max_difference: float
    tolerance: float
    opset: int
    zeros: int
    bytes: int


def export_onnx(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    dynamic: Mapping[str, Sequence[int]] | None = None,
    tolerance: float = 1e-4,
) -> OnnxCheck:
    """Writes a model of plain layers as ONNX and compares ONNX Runtime's outputs with torch's, on the CPU.

    The weights are dense tensors with exact zeros. ONNX Runtime computes with the zeros like with any number; TensorRT
    takes its 2:4 kernels where they win, when its builder is told so (``trtexec --sparsity=enable``).

    Args:
        model: Called as ``model(**inputs)``; returns a tensor, or a tuple of tensors.
        inputs: Example tensors by argument name, in the order of the arguments.
        path: The file.
        dynamic: Axes of each input that may vary in length, ``{"x": [0]}`` for the batch. The check then also runs
            inputs with these axes one longer.
        tolerance: Largest allowed difference, relative to the largest output (absolute below 1).

    Raises:
        LossplugError: A package is missing, a layer is plugged, the model can't be exported, the file computes
            something else, or zeros were lost; the file is then removed.
    """
    require("onnxscript", "onnx", "an ONNX export")
    onnx = require("onnx", "onnx", "an ONNX export")
    require("onnxruntime", "onnx", "the check of an ONNX export")
    plugged = next(plugged_layers(model), None)
    if plugged is not None:
        raise LossplugError("the layer is still plugged", where=plugged[0], remedy="Fold the model first")
    path = Path(path)
    model = copy.deepcopy(model).cpu().float().eval()
    inputs = {name: value.detach().cpu() for name, value in inputs.items()}
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    axes = {name: tuple((dynamic or {}).get(name, ())) for name in inputs}
    shapes = {name: dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in inputs}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (),
                str(path),
                kwargs=dict(inputs),
                input_names=list(inputs),
                dynamic_shapes=shapes if any(axes.values()) else None,
                external_data=size > _INLINE_BYTES,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever a foreign forward does
        _remove(path)
        raise LossplugError(
            f"torch can't export it as ONNX ({type(error).__name__}: {_first_line(error)})",
            where=type(model).__name__,
            remedy="Make its axes fixed (dynamic=None), or export the part that is a plain network",
        ) from error
    try:
        worst = _compare(model, inputs, path, tolerance)
        if any(axes.values()):
            longer = {name: _longer(value, axes[name]) for name, value in inputs.items()}
            worst = max(worst, _compare(model, longer, path, tolerance))
        proto = onnx.load(str(path))
        zeros = _count_zeros(onnx, proto, model)
    except LossplugError:
        _remove(path)
        raise
    opset = max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return OnnxCheck(worst, tolerance, opset, zeros, sum(part.stat().st_size for part in _parts(path)))


def _compare(model: nn.Module, inputs: dict[str, Tensor], path: Path, tolerance: float) -> float:
    runtime = require("onnxruntime", "onnx", "the check of an ONNX export")
    with torch.no_grad():
        expected = model(**inputs)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken = {entry.name for entry in session.get_inputs()}  # an argument without effect leaves the graph
    found = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in taken})
    expected = (expected,) if isinstance(expected, Tensor) else tuple(expected)
    worst = 0.0
    for want, got in zip(expected, found, strict=True):
        difference = float((want - torch.from_numpy(got)).abs().max())
        worst = max(worst, difference)
        if not difference <= tolerance * max(1.0, float(want.abs().max())):
            raise LossplugError(
                f"ONNX Runtime's output is {difference:.3g} away from torch's", where=str(path), remedy="Report it"
            )
    return worst


def _count_zeros(onnx: Any, proto: Any, model: nn.Module) -> int:
    # Vectors and scalars come and go with constant folding; matrices are what was pruned.
    tensors = [entry for entry in proto.graph.initializer if len(entry.dims) >= 2]
    zeros = sum(int((onnx.numpy_helper.to_array(entry) == 0).sum()) for entry in tensors)
    wanted = sum(p.numel() - int(p.count_nonzero()) for p in model.parameters() if p.ndim >= 2)
    if zeros < wanted:
        raise LossplugError(f"the ONNX file holds {zeros} zeros, the model {wanted}", where="export_onnx")
    return zeros


def _longer(value: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        value = torch.cat([value, value.narrow(axis, 0, 1)], dim=axis)
    return value


def _parts(path: Path) -> list[Path]:
    return [part for part in (path, path.with_name(f"{path.name}.data")) if part.exists()]


def _remove(path: Path) -> None:
    for part in _parts(path):
        part.unlink()


def _first_line(error: BaseException) -> str:
    cause: BaseException = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (lines[0] if lines else type(cause).__name__)[:200]
