"""Which weights the 2:4 kernels of a GPU can use, told group by group, and the conversion for torch's own kernels.

A pattern alone says little: 1:8 fits in 2:4, 4:8 doesn't, and a kernel also wants its dtype and its shapes. Who runs
faster on such zeros (none was timed here, so no speed is promised):

- torch: :func:`to_semi_structured`, for ``Linear`` on CUDA, compute capability 8.0 or newer.
- TensorRT: reads dense weights with zeros from ONNX and takes 2:4 kernels where they win, if its builder is told that
  weights are sparse (``trtexec --sparsity=enable``); convolutions too.
- vLLM, compressed-tensors, transformers: took 2:4 support out in 2026; they run the dense weights.
- ONNX Runtime, and every dense kernel: compute with the zeros like with any number.
"""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.surgery.plug import plain_class, plugged_layers
from lightning_lossplug.surgery.select import Candidate, candidates

Backend = Literal["cusparselt", "cutlass"]

# Rows and columns of a Linear's [out, in] have to be multiples of these: torch/sparse/semi_structured.py, torch 2.15.
MULTIPLES: dict[Backend, dict[torch.dtype, tuple[int, int]]] = {
    "cusparselt": {torch.float16: (16, 16), torch.bfloat16: (16, 16), torch.int8: (32, 32)},
    "cutlass": {
        torch.float16: (32, 64),
        torch.bfloat16: (32, 64),
        torch.int8: (16, 128),
        torch.float32: (32, 32),
    },
}


@dataclass(frozen=True)
class LayerReport:
    """What a 2:4 kernel finds in one weight.

    Args:
        name: Path of the layer.
        kind: Its class.
        shape: Of the weight.
        sparsity: Share of exact zeros.
        pattern: ``2:4`` where the fullest group of four along the reduction axis holds two nonzeros, ``dense`` where
            it holds four; ``-`` where four doesn't divide the axis.
        groups: Groups of four.
        compliant: Groups with at most two nonzeros.
        usable: Whether torch's kernels take it, in the report's dtype.
        why: Every reason why not; empty for a usable one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    pattern: str
    groups: int
    compliant: int
    usable: bool
    why: str


@dataclass(frozen=True)
class HardwareReport:
    """One row for every weight of a product, in model order.

    Args:
        layers: The rows.
        dtype: The dtype that was asked for, or ``None`` for each weight's own.
        backend: Whose kernels.
    """

    layers: tuple[LayerReport, ...]
    dtype: str | None
    backend: str

    @property
    def usable(self) -> tuple[LayerReport, ...]:
        """The layers that 2:4 kernels take."""
        return tuple(layer for layer in self.layers if layer.usable)

    def rows(self, *, compact: bool = False) -> list[tuple[str, str, str, str, str, str, str]]:
        """Returns ``(layer, kind, shape, zeros, pattern, usable, why not)`` as text.

        Args:
            compact: One row for layers that differ only in numbers of their paths (the blocks of a network).
        """
        found: dict[tuple[str, ...], int] = {}
        for layer in self.layers:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name) if compact else layer.name
            shape, share = "x".join(map(str, layer.shape)), f"{layer.sparsity:.1%}"
            key = (name, layer.kind, shape, share, layer.pattern, "yes" if layer.usable else "no", layer.why)
            found[key] = found.get(key, 0) + 1
        return [(f"{k[0]} ({count})" if count > 1 else k[0], *k[1:]) for k, count in found.items()]  # type: ignore[misc]

    def table(self, *, compact: bool = False) -> str:
        """Returns the report as a plain-text table."""
        rows = [("layer", "kind", "shape", "zeros", "pattern", "usable", "why not"), *self.rows(compact=compact)]
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report in plain types, for JSON."""
        return {
            "dtype": self.dtype,
            "backend": self.backend,
            "usable": len(self.usable),
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
        }


@torch.no_grad()
def hardware_report(
    model: nn.Module, *, dtype: torch.dtype | None = None, backend: Backend = "cusparselt"
) -> HardwareReport:
    """Tells for every weight of a product whether 2:4 kernels can use it, and why not.

    What the forward pass uses is judged: of a plugged layer the masked weight. Embeddings have no product and aren't
    listed, nor are weights tied to one.

    Args:
        model: Plain or plugged.
        dtype: Judge as if the weights were of this type, since deployment often casts; None: as they are.
        backend: ``cusparselt`` (what torch uses by default) or ``cutlass``; their minimum shapes differ.

    Raises:
        LossplugError: Unknown backend.
    """
    if backend not in MULTIPLES:
        raise LossplugError(
            f"unknown backend {backend!r}", where="hardware_report", remedy=f"Known: {', '.join(MULTIPLES)}"
        )
    found = tuple(_judge(c, dtype, backend) for c in candidates(model) if c.reduction_axis is not None)
    return HardwareReport(found, _dtype_name(dtype) if dtype else None, backend)


def _judge(candidate: Candidate, dtype: torch.dtype | None, backend: Backend) -> LayerReport:
    weight: Tensor = getattr(candidate.layer, candidate.parameter).detach()
    if hasattr(weight, "_local_tensor"):
        weight = weight.full_tensor()  # type: ignore[attr-defined]
    assert candidate.reduction_axis is not None
    pattern, groups, compliant, reasons = _groups(weight, candidate.reduction_axis)
    reasons += _layer_reasons(candidate, weight, dtype or weight.dtype, backend)
    return LayerReport(
        name=candidate.name,
        kind=plain_class(candidate.layer).__name__,
        shape=tuple(weight.shape),
        sparsity=1 - int(weight.count_nonzero()) / max(weight.numel(), 1),
        pattern=pattern,
        groups=groups,
        compliant=compliant,
        usable=not reasons,
        why="; ".join(reasons),
    )


def _groups(weight: Tensor, axis: int) -> tuple[str, int, int, list[str]]:
    length = weight.shape[axis]
    if length % 4:
        return "-", 0, 0, [f"4 does not divide its reduction axis of {length}"]
    counts = weight.movedim(axis, -1).reshape(-1, 4).count_nonzero(1)
    most, groups, compliant = int(counts.max()), len(counts), int((counts <= 2).sum())
    reasons = [f"{groups - compliant} of {groups} groups hold more than 2 nonzeros"] if compliant < groups else []
    return "dense" if most == 4 else f"{most}:4", groups, compliant, reasons


def _layer_reasons(candidate: Candidate, weight: Tensor, dtype: torch.dtype, backend: Backend) -> list[str]:
    kind = plain_class(candidate.layer).__name__
    if weight.ndim > 2:
        return [f"torch has 2:4 kernels for Linear only, not for {kind} (TensorRT has)"]
    if candidate.reduction_axis != 1:
        return [f"{kind} stores it [in, out]; torch's kernels take a Linear's [out, in]"]
    if not isinstance(candidate.layer, nn.Linear):
        return [f"{kind} reads it as a plain tensor, not as a Linear"]
    if dtype not in MULTIPLES[backend]:
        known = ", ".join(map(_dtype_name, MULTIPLES[backend]))
        return [f"{backend} has no {_dtype_name(dtype)} kernel (it has {known})"]
    rows, columns = MULTIPLES[backend][dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return [f"{backend} wants [out, in] in multiples of {rows} and {columns} in {_dtype_name(dtype)}"]
    return []


def to_semi_structured(model: nn.Module, *, dtype: torch.dtype = torch.float16, inplace: bool = False) -> nn.Module:
    """Returns the model on CUDA with every usable ``Linear`` weight in torch's 2:4 format, for inference.

    Uses :func:`torch.sparse.to_sparse_semi_structured`, a prototype of torch: halves the bytes of these weights (plus
    their positions) and multiplies on sparse tensor cores. Whether that is faster depends on the shapes: time it. The
    result can't be trained or saved as safetensors; export the dense model and convert after loading.

    Args:
        model: Plain (folded) layers.
        dtype: The whole model is cast to it: ``float16`` or ``bfloat16``.
        inplace: Convert the model itself rather than a copy.

    Raises:
        LossplugError: No CUDA device with 2:4 kernels, a plugged layer, or no usable weight (with the first reason).
    """
    where = "to_semi_structured"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise LossplugError(
            "2:4 kernels need a CUDA device of compute capability 8.0 or newer, and there is none here",
            where=where,
            remedy="Convert on the machine that serves the model; hardware_report tells here what it will take",
        )
    plugged = next(plugged_layers(model), None)
    if plugged is not None:
        raise LossplugError("the layer is still plugged", where=plugged[0], remedy="Fold the model first")
    cutlass = torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
    report = hardware_report(model, dtype=dtype, backend="cutlass" if cutlass else "cusparselt")
    if not report.usable:
        first = next((f"{layer.name}: {layer.why}" for layer in report.layers), "the model has no products")
        raise LossplugError(f"no layer can be converted; {first}", where=where)
    model = (model if inplace else copy.deepcopy(model)).to("cuda", dtype).eval()
    for row in report.usable:
        layer: Any = model.get_submodule(row.name)
        packed = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        layer.weight = nn.Parameter(packed, requires_grad=False)
    return model


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
