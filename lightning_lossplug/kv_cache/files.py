"""Factors as files beside a model, and as plain values in a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.kv_cache.plan import KVFactors, layer_tensors, layers_from_tensors
from lightning_lossplug.kv_cache.settings import KVShrinkSettings

TENSORS, SETTINGS = "kv_factors.safetensors", "kv_factors.json"
FORMAT = 1


def save_kv_factors(factors: KVFactors, folder: str | Path) -> Path:
    """Writes ``kv_factors.safetensors`` and ``kv_factors.json`` into a folder, that of the model say.

    The model's own files are not touched: ``from_pretrained`` loads it as before.

    Args:
        factors: The factors.
        folder: Where to; made if it is missing.

    Returns:
        The folder.

    Raises:
        LossplugError: It can't be written.
    """
    safetensors = require("safetensors.torch", "lightning", "saving KV factors")
    folder = Path(folder)
    plain = _plain(factors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.save_file(layer_tensors(factors), folder / TENSORS, metadata={"format": "pt"})
        (folder / SETTINGS).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise LossplugError(f"can't be written: {error.strerror or error}", where=str(folder)) from None
    return folder


def load_kv_factors(folder: str | Path) -> KVFactors:
    """Reads what :func:`save_kv_factors` wrote.

    Raises:
        LossplugError: The files are not there or damaged.
    """
    safetensors = require("safetensors.torch", "lightning", "loading KV factors")
    folder = Path(folder)
    try:
        plain = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        tensors = safetensors.load_file(folder / TENSORS)
    except FileNotFoundError as error:
        raise LossplugError(
            f"there is no {Path(error.filename or TENSORS).name}",
            where=str(folder),
            remedy="lossplug shrink-kv makes it",
        ) from None
    except Exception as error:  # safetensors has an error class of its own
        raise LossplugError(f"can't be read: {error}", where=str(folder)) from None
    return _rebuild(plain, tensors, str(folder))


def factors_to_state(factors: KVFactors) -> dict[str, Any]:
    """Returns plain values and tensors, for a checkpoint."""
    return {"plain": _plain(factors), "tensors": layer_tensors(factors)}


def factors_from_state(state: dict[str, Any]) -> KVFactors:
    """Rebuilds what :func:`factors_to_state` returned."""
    return _rebuild(state["plain"], state["tensors"], "checkpoint")


def shared_factors(factors: KVFactors) -> KVFactors:
    """Returns the factors of the first process of the default group, on all of them; its own outside one."""
    if not (dist.is_available() and dist.is_initialized()):
        return factors
    held = [factors_to_state(factors)]
    dist.broadcast_object_list(held, src=0)
    return factors_from_state(held[0])


def _plain(factors: KVFactors) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": dataclasses.asdict(factors.settings),
        "fingerprint": factors.fingerprint,
        "tokens": factors.tokens,
        "layers": factors.summary(2)["layers"],
    }


def _rebuild(plain: dict[str, Any], tensors: dict[str, Any], where: str) -> KVFactors:
    if plain.get("format") != FORMAT:
        raise LossplugError(f"the KV factors have format {plain.get('format')!r}, known is {FORMAT}", where=where)
    layers = layers_from_tensors(tensors, plain["layers"])
    return KVFactors(layers, KVShrinkSettings(**plain["settings"]), plain["fingerprint"], plain["tokens"])
