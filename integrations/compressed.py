"""Quantised language models in the layout of compressed-tensors, which transformers and vLLM load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export.dense import dense_state, write_safetensors
from lightning_lossplug.export.folder import artifact_folder
from lightning_lossplug.integrations.network import library_of
from lightning_lossplug.quantization.base import Codes, Quantizer
from lightning_lossplug.quantization.dynamic import Dynamic
from lightning_lossplug.quantization.integer import input_bounds, quantizer_of, weight_codes
from lightning_lossplug.quantization.packing import pack_codes
from lightning_lossplug.surgery.plug import INPUT, fold, latent, plain_class, plugged_layers

WORD = 8  # codes of 4 bits in an int32


def save_compressed(
    model: nn.Module, output: str | Path, *, tokenizer: Any = None, overwrite: bool = False
) -> dict[str, Any]:
    """Writes a transformers model with its linear weights as int4 words or int8 codes, and how to read them.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it where the package compressed-tensors is installed, and
    vLLM does. Codes up to 4 bits are ``pack-quantized`` (eight in an int32), wider ones ``int-quantized``; scales are
    those of training, per tensor, channel or group. A static step of a layer's input goes along as ``input_scale``; the
    steps of ``dynamic`` inputs are measured per token by what loads the folder.
    The unpacked weights are the trained model's to the last bit.

    Args:
        model: A transformers model with plugged layers; it stays as it is.
        output: The folder.
        tokenizer: Saved beside it.
        overwrite: Whether to replace an artifact that is there.

    Returns:
        The ``quantization_config`` that was written, with ``bytes`` of the file.

    Raises:
        LossplugError: No transformers model, nothing quantised, a quantised layer that the layout has no form for.
    """
    if library_of(model) != "transformers":
        raise LossplugError(
            f"{type(model).__name__} is no transformers model",
            where="save_compressed",
            remedy="compressed-tensors is a format for those; give the sub-module that is one",
        )
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, str] = {}
    for name, layer in plugged_layers(model):
        found, scheme = _layer(name, layer)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
        schemes[name] = json.dumps(scheme)
    if not schemes:
        raise LossplugError("the model has no quantised layer", where="save_compressed", remedy="Train it with QAT")
    config = _config(model, schemes)
    dense = dense_state(fold(model))
    tied = getattr(model, "_tied_weights_keys", None) or {}
    rest = {key: value for key, value in dense.items() if key.removesuffix(".weight") not in schemes}
    if getattr(model.config, "tie_word_embeddings", False):
        rest = {key: value for key, value in rest.items() if key not in tied}
    with artifact_folder(Path(output), overwrite=overwrite) as stage:
        model.config.save_pretrained(stage)  # type: ignore[operator, union-attr]
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(stage)  # type: ignore[operator, union-attr]
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        file = stage / "config.json"
        described = json.loads(file.read_text(encoding="utf-8")) | {
            "architectures": [type(model).__name__],
            "quantization_config": config,
        }
        file.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        write_safetensors(rest | tensors, stage / "model.safetensors")
        size = (stage / "model.safetensors").stat().st_size
    return {**config, "bytes": size}


def _layer(name: str, layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weight, inputs = quantizer_of(layer), quantizer_of(layer, INPUT)
    if plain_class(layer) is not nn.Linear or weight is None:
        raise LossplugError(
            f"a {plain_class(layer).__name__} {'without quantised weights ' if weight is None else ''}has no form in "
            "compressed-tensors",
            where=name,
            remedy="Exclude it in training (first_last_bits=null leaves the output layer out)",
        )
    weight.check_ready()
    if not weight.has_codes or weight.layout.axis != 0:
        raise LossplugError(f"{weight.name} has no symmetric codes of 8 bits or fewer", where=name)
    coded = weight_codes(layer, weight)
    low, high = int(coded.codes.min()), int(coded.codes.max())
    if coded.zero_point is not None or low < -128 or high > 127:
        raise LossplugError(f"{weight.name} has no symmetric codes of 8 bits or fewer", where=name)
    bits = 4 if low >= -8 and high <= 7 else 8
    rows, columns = coded.codes.shape
    if bits == 4 and columns % WORD:
        raise LossplugError(f"its {columns} inputs don't fill words of {WORD} codes", where=name, remedy="Exclude it")
    tensors = _weight(coded, bits)
    arguments: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    group = weight.layout.group_size
    arguments |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    tensors["weight_scale"] = coded.scale.reshape(-1, columns // group if group else 1).expand(rows, -1).contiguous()
    scheme: dict[str, Any] = {"weights": arguments, "input_activations": None, "output_activations": None}
    if inputs is not None:
        scheme["input_activations"], found = _input(name, inputs, latent(layer))
        tensors |= found
    scheme["format"] = "pack-quantized" if bits == 4 else "int-quantized"
    return {key: value.cpu() for key, value in tensors.items()}, scheme


def _weight(coded: Codes, bits: int) -> dict[str, Tensor]:
    if bits == 8:
        return {"weight": coded.codes.to(torch.int8)}
    rows, columns = coded.codes.shape
    words = pack_codes(coded.codes.cpu(), -8, 7).view(torch.int32).reshape(rows, columns // WORD)
    return {"weight_packed": words, "weight_shape": torch.tensor([rows, columns])}


def _input(name: str, inputs: Quantizer, like: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    inputs.check_ready()
    if isinstance(inputs, Dynamic):
        if inputs.bits not in (4, 8):
            raise LossplugError(f"its input has {inputs.bits} bits", where=name, remedy="Use 8 or 4 bits for inputs")
        kind = {"num_bits": inputs.bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return kind, {}
    step, zero = inputs.grid(like.new_zeros(1))
    low, high = input_bounds(inputs)
    bits = (high - low + 1).bit_length() - 1
    if high - low + 1 != 2**bits or bits not in (4, 8):
        raise LossplugError(
            f"its input has codes from {low} to {high}", where=name, remedy="Use 8 or 4 bits for inputs"
        )
    # The layout's codes are signed: an unsigned grid is one whose zero lies at the lower end.
    point = (0 if zero is None else int(zero)) - low - 2 ** (bits - 1)
    arguments = {"num_bits": bits, "type": "int", "symmetric": point == 0, "strategy": "tensor", "dynamic": False}
    tensors = {"input_scale": step.detach().float().reshape(1)}
    if point:
        tensors["input_zero_point"] = torch.tensor([point], dtype=torch.int8)
    return arguments, tensors


def _config(model: nn.Module, schemes: dict[str, str]) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    others = [n for n, m in model.named_modules() if plain_class(m) is nn.Linear and n not in schemes]
    found = {
        f"group_{i}": {"targets": ["Linear"] if len(groups) == 1 else names, **json.loads(scheme)}
        for i, (scheme, names) in enumerate(groups.items())
    }
    formats = {group["format"] for group in found.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": found,
        "ignore": others,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
