"""Built-in models and data for timm and transformers; a class and its library are imported when first touched."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_lossplug.errors import require
from lightning_lossplug.registry import register_path

# name: module, optional packages with the extra that brings each
_LIGHTNING = {"lightning": "lightning"}
_EXPORTS: dict[str, tuple[str, dict[str, str]]] = {
    "ImageClassifier": ("vision", {**_LIGHTNING, "torchmetrics": "lightning", "timm": "timm"}),
    "CausalLM": ("language", {**_LIGHTNING, "torchmetrics": "lightning", "transformers": "transformers"}),
    "DigitsData": ("data.digits", {**_LIGHTNING, "sklearn": "vision"}),
    "IDXData": ("data.mnist", _LIGHTNING),
    "FashionMNISTData": ("data.mnist", _LIGHTNING),
    "DomainShiftData": ("data.domains", _LIGHTNING),
    "TextData": ("data.text", _LIGHTNING),
    "BatchedDataModule": ("data.module", _LIGHTNING),
    "ResumableLoader": ("data.loader", {}),
    "WithSampleIds": ("data.sample_ids", {}),
    "read_idx": ("data.idx", {}),
    "ChannelShrunkCache": ("kv_cache", {"transformers": "transformers"}),
    "decode_perplexity": ("kv_cache", {"transformers": "transformers", "torchmetrics": "lightning"}),
    "load_causal_lm": ("pretrained", {}),
    "load_tokenizer": ("pretrained", {}),
    "smollm2_path": ("pretrained", {}),
    "drop_layers": ("layer_drop", {}),
    "export_quantized": ("quantized_artifact", _LIGHTNING),
    "save_packed": ("packed", {}),
    "load_packed": ("packed", {}),
    "save_compressed": ("compressed", {"transformers": "transformers"}),
    "export_onnx_qdq": ("onnx_qdq", {}),
    "torchao_model": ("torchao_weights", {}),
    "save_bitsandbytes": ("bitsandbytes_modules", {"transformers": "transformers"}),
    "timm_teacher": ("teachers", {}),
    "hf_teacher": ("teachers", {}),
    "checkpoint_teacher": ("teachers", {}),
    "artifact_teacher": ("teachers", {}),
}
__all__ = list(_EXPORTS)

# Registered as attributes of this package, not of the modules: that way a missing library is named in one clear line.
for _kind, _name, _family in (
    ("model", "ImageClassifier", "vision"),
    ("model", "CausalLM", "language"),
    ("data", "DigitsData", "vision"),
    ("data", "IDXData", "vision"),
    ("data", "FashionMNISTData", "vision"),
    ("data", "DomainShiftData", "vision"),
    ("data", "TextData", "language"),
):
    register_path(_kind, _name, f"{__name__}.{_name}", family=_family)
register_path(
    "function",
    "drop_layers",
    f"{__name__}.drop_layers",
    family="distillation",
    paper="DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
)
for _name, _function in (
    ("packed", "save_packed"),
    ("compressed_tensors", "save_compressed"),
    ("onnx_qdq", "export_onnx_qdq"),
    ("bitsandbytes", "save_bitsandbytes"),
    ("torchao", "torchao_model"),
):
    register_path("exporter", _name, f"{__name__}.{_function}", family="quantisation")
for _name in ("timm", "hf", "checkpoint", "artifact"):
    register_path("teacher", _name, f"{__name__}.{_name}_teacher", family="distillation")


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, packages = _EXPORTS[name]
    for package, extra in packages.items():
        require(package, extra, name)
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
