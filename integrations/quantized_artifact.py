"""Quantised modules as folders in one of the formats that other programs read."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.export.folder import artifact_folder, write_manifest
from lightning_lossplug.integrations.artifact_files import ONNX, example_inputs, onnx_module
from lightning_lossplug.integrations.bitsandbytes_modules import Kind, save_bitsandbytes
from lightning_lossplug.integrations.compressed import save_compressed
from lightning_lossplug.integrations.network import Network, find_network
from lightning_lossplug.integrations.onnx_qdq import export_onnx_qdq
from lightning_lossplug.integrations.packed import save_packed
from lightning_lossplug.surgery.attention import attending_layers
from lightning_lossplug.surgery.plug import fold

Format = Literal["packed", "compressed_tensors", "onnx_qdq", "bitsandbytes_int8", "bitsandbytes_nf4"]
FORMATS: tuple[str, ...] = get_args(Format)
PACKED = "model.safetensors"


def export_quantized(
    module: nn.Module,
    output: str | Path,
    format: Format,
    *,
    overwrite: bool = False,
    network: str | None = None,
    tokenizer: Any = None,
    inputs: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Writes the network of a QAT module as a folder.

    Args:
        module: A LightningModule or a network with quantised layers.
        output: The folder.
        format: ``packed`` (codes without gaps, read by ``integrations.packed.load_packed``), ``compressed_tensors``
            (transformers and vLLM), ``onnx_qdq`` (ONNX Runtime, TensorRT), ``bitsandbytes_int8`` or
            ``bitsandbytes_nf4`` (transformers; see :func:`save_bitsandbytes` for what changes).
        overwrite: Whether to replace an artifact that is there.
        network: Path of the sub-module to export; None finds it.
        tokenizer: Saved beside a transformers model in ``compressed_tensors`` and the bitsandbytes formats.
        inputs: Example tensors by argument name for ``onnx_qdq``; None makes them for timm and transformers models.

    Returns:
        ``format``, ``class``, ``bytes`` of the file, ``folder``, ``load``, a line that loads it, and
        ``float_attention``, the number of attention modules whose operands were quantised in training and are not in
        the folder's model: none of the formats has a place for them.

    Raises:
        LossplugError: Another format, nothing quantised, or what the format has no form for.
    """
    if format not in FORMATS:
        raise LossplugError(f"there is no format {format!r}", where="export", remedy=suggestion(format, FORMATS))
    output, found = Path(output), find_network(module, network)
    manifest: dict[str, Any] = {"format": format, "class": type(found.module).__name__, "folder": str(output)}
    manifest["float_attention"] = sum(1 for _ in attending_layers(found.module))
    if format.startswith("bitsandbytes"):
        kind: Kind = "int8" if format == "bitsandbytes_int8" else "nf4"
        made = save_bitsandbytes(found.module, output, kind, tokenizer=tokenizer, overwrite=overwrite)
        return {
            **manifest,
            "bytes": made["bytes"],
            "layers": len(made["layers"]),
            "exact_layers": sum(entry["exact"] for entry in made["layers"].values()),
            "largest_error": max(entry["error"] for entry in made["layers"].values()),
            "dropped_input_steps": len(made["inputs"]),
            "load": f'AutoModelForCausalLM.from_pretrained("{output}")  # pip install bitsandbytes',
        }
    if format == "compressed_tensors":
        written = save_compressed(found.module, output, tokenizer=tokenizer, overwrite=overwrite)
        load = f'AutoModelForCausalLM.from_pretrained("{output}")  # pip install compressed-tensors'
        return {**manifest, "bytes": written["bytes"], "load": load}
    with artifact_folder(output, overwrite=overwrite) as stage:
        if format == "packed":
            report = save_packed(found.module, stage / PACKED)
            manifest |= {"codes_and_scales": report["bytes"], "float_bytes": report["float_bytes"]}
            manifest["bytes"] = (stage / PACKED).stat().st_size
            manifest["load"] = f'load_packed(network, "{output / PACKED}")'
        else:
            given = _inputs(found) if inputs is None else inputs
            axes = {n: [0, 1] if v.dtype == torch.long and v.ndim == 2 else [0] for n, v in given.items()}
            check = export_onnx_qdq(onnx_module(found), given, stage / ONNX, dynamic=axes)
            manifest |= {"max_difference": check.max_difference, "opset": check.opset, "bytes": check.bytes}
            manifest["load"] = f'onnxruntime.InferenceSession("{output / ONNX}")'
        write_manifest(stage, manifest)
    return manifest


def _inputs(found: Network) -> dict[str, Tensor]:
    if found.library != "timm":
        return example_inputs(found, Path())
    from timm.models import save_for_hf

    with TemporaryDirectory() as folder:  # what timm writes of a network says which images it takes
        save_for_hf(fold(found.module), folder, safe_serialization=True)
        return example_inputs(found, Path(folder))
