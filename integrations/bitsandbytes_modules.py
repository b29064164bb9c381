"""Language models with bitsandbytes' 8-bit or 4-bit linear layers, which transformers loads by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError, require, suggestion
from lightning_lossplug.export.dense import dense_state, write_safetensors
from lightning_lossplug.export.folder import artifact_folder
from lightning_lossplug.integrations.network import library_of
from lightning_lossplug.quantization.integer import quantizer_of, weight_codes
from lightning_lossplug.surgery.plug import INPUT, fold, plain_class, plugged_layers

Kind = Literal["int8", "nf4"]
KINDS = ("int8", "nf4")
TOP = 127  # bitsandbytes keeps the largest magnitude of a row, which is code 127


def save_bitsandbytes(
    model: nn.Module, output: str | Path, kind: Kind = "int8", *, tokenizer: Any = None, overwrite: bool = False
) -> dict[str, Any]:
    """Writes a transformers model with its linear layers in bitsandbytes' int8 or NF4.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it where bitsandbytes is installed. Of a trained model the
    layers with quantised weights are converted, of a plain one all linear layers but the output layer.

    ``int8`` has one scale per row: codes of at most 8 bits trained with a scale per tensor or channel are kept, the
    scale to float32 rounding. ``nf4`` has a table of 16 values and a largest magnitude per 64 weights, which no trained
    step fits: weights are rounded again, and the error that adds is returned. Neither keeps the static step of a
    layer's input: bitsandbytes quantises the inputs of int8 layers by the largest value of each row, and leaves those
    of NF4 layers in floating point.

    Args:
        model: A transformers model, with or without plugged layers; it stays as it is.
        output: The folder.
        kind: ``int8`` or ``nf4``.
        tokenizer: Saved beside it.
        overwrite: Whether to replace an artifact that is there.

    Returns:
        ``bytes`` of the file, ``layers`` with ``exact`` (the trained codes are kept) and ``error`` (Frobenius norm of
        the change over that of the weight) each, and ``inputs``, the layers whose trained input steps are dropped.

    Raises:
        LossplugError: bitsandbytes is not installed, another kind, no transformers model, no such layer, scales that
            were never set or are not above 0, values that are not finite.
    """
    if kind not in KINDS:
        raise LossplugError(f"kind is {kind!r}", where="save_bitsandbytes", remedy=suggestion(kind, KINDS))
    if library_of(model) != "transformers":
        raise LossplugError(
            f"{type(model).__name__} is no transformers model",
            where="save_bitsandbytes",
            remedy="bitsandbytes modules are loaded by transformers; give the sub-module that is such a model",
        )
    require("bitsandbytes", "bitsandbytes", "bitsandbytes modules")
    plain: Any = fold(model)
    state = dense_state(plain)
    names = _layers(model, plain)
    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, Any]] = {}
    for name in names:
        weight = state[f"{name}.weight"]
        kept = _trained_rows(model.get_submodule(name)) if kind == "int8" else None
        found, value = _int8(weight, kept) if kind == "int8" else _nf4(weight)
        tensors |= {f"{name}.{key}": tensor for key, tensor in found.items()}
        error = float((value - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))
        report[name] = {"exact": kept is not None, "error": error}
    tied = getattr(plain, "_tied_weights_keys", None) or {}
    rest = {key: value for key, value in state.items() if key.removesuffix(".weight") not in report}
    if getattr(plain.config, "tie_word_embeddings", False):
        rest = {key: value for key, value in rest.items() if key not in tied}
    skipped = [n for n, m in plain.named_modules() if type(m) is nn.Linear and n not in report]
    # transformers takes a name for the end of any path, too, unless it is marked as a whole
    skipped = [f"{n}$" if any(name.endswith(n) for name in report) else n for n in skipped]
    with artifact_folder(Path(output), overwrite=overwrite) as stage:
        plain.config.save_pretrained(stage)
        if getattr(plain, "generation_config", None) is not None:
            plain.generation_config.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        file = stage / "config.json"
        described = json.loads(file.read_text(encoding="utf-8")) | {
            "architectures": [type(plain).__name__],
            "quantization_config": _config(kind, skipped),
        }
        file.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        write_safetensors(rest | tensors, stage / "model.safetensors")
        size = (stage / "model.safetensors").stat().st_size
    dropped = [n for n, layer in plugged_layers(model) if n in report and quantizer_of(layer, INPUT) is not None]
    return {"bytes": size, "layers": report, "inputs": dropped}


def _layers(model: nn.Module, plain: Any) -> list[str]:
    trained = [
        name
        for name, layer in plugged_layers(model)
        if plain_class(layer) is nn.Linear and quantizer_of(layer) is not None
    ]
    if not trained and any(True for _ in plugged_layers(model)):
        raise LossplugError(
            "no linear layer has quantised weights", where="save_bitsandbytes", remedy="Train with QAT, or fold first"
        )
    head = plain.get_output_embeddings()
    names = trained or [n for n, m in plain.named_modules() if type(m) is nn.Linear and m is not head]
    if not names:
        raise LossplugError("the model has no linear layer to convert", where="save_bitsandbytes")
    return names


def _trained_rows(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Codes and a scale per row, or None where the grid is another."""
    weight = quantizer_of(layer)
    if weight is None or not weight.has_codes or weight.layout.axis != 0 or weight.layout.group_size:
        return None
    weight.check_ready()
    coded = weight_codes(layer, weight)
    zero = coded.zero_point
    if (zero is not None and bool((zero != 0).any())) or int(coded.codes.min()) < -128 or int(coded.codes.max()) > TOP:
        return None
    return coded.codes.to("cpu", torch.int8), coded.scale.float().cpu().reshape(-1).expand(len(coded.codes))


def _int8(weight: Tensor, kept: tuple[Tensor, Tensor] | None) -> tuple[dict[str, Tensor], Tensor]:
    if kept is None:
        scale = weight.float().abs().amax(1).clamp_min(1e-30) / TOP
        kept = (weight.float() / scale[:, None]).round().to(torch.int8), scale
    codes, scale = kept
    tensors = {"weight": codes, "SCB": scale * TOP, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * scale[:, None]


def _nf4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4")
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": packed, **parts}, dequantize_4bit(packed, state).float()


def _config(kind: Kind, skipped: list[str]) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    options: Any = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped).to_dict()
