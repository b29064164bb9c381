"""The files of a cache of teacher logits: safetensors shards with checksums, and one manifest."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError, require

MANIFEST, FORMAT = "teacher_cache.json", 1
_TYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}
Manifest = dict[str, Any]


def read_manifest(folder: Path) -> Manifest | None:
    """Returns what a folder's manifest says, or None where there is none.

    Raises:
        LossplugError: It is no manifest.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LossplugError(f"can't be read ({error})", where=str(path), remedy="Make the cache anew") from None
    if found.get("format") != FORMAT:
        raise LossplugError(f"has format {found.get('format')!r}, expected {FORMAT}", where=str(path))
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest in one step: a killed run leaves the old one or the new one."""
    _replace(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a shard in one step; returns its record for the manifest."""
    safetensors = require("safetensors.torch", "lightning", "a cache of teacher logits")
    data = safetensors.save({name: t.contiguous() for name, t in tensors.items()})
    path = folder / f"shard-{number:05d}.safetensors"
    _replace(path, data)
    return {
        "file": path.name,
        "samples": len(tensors["ids"]),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise LossplugError(f"can't be written: {error.strerror or error}", where=str(path)) from None


def open_shard(folder: Path, record: dict[str, Any], verify: bool) -> dict[str, Tensor]:
    """Returns the tensors of a shard, mapped from the file: nothing is read before it is used.

    Args:
        folder: The cache.
        record: Of the manifest.
        verify: Whether to read the file once and compare its checksum.

    Raises:
        LossplugError: The file is not there, shorter or longer than it was, or changed.
    """
    path = folder / record["file"]
    remedy = "Run lossplug cache-teacher again: it makes this file anew"
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            word = "truncated" if size < record["bytes"] else "longer than it was written"
            raise LossplugError(f"is {word}: {size} of {record['bytes']} bytes", where=str(path), remedy=remedy)
        if verify:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != record["sha256"]:
                raise LossplugError("has another checksum than when it was written", where=str(path), remedy=remedy)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except OSError as error:
        raise LossplugError(f"can't be read: {error.strerror or error}", where=str(path), remedy=remedy) from None
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        if 0 in shape:
            found[name] = torch.from_numpy(np.empty(shape, _TYPES[entry["dtype"]]))
            continue
        # copy-on-write: torch wants memory it could write to; the file is never changed
        found[name] = torch.from_numpy(np.memmap(path, _TYPES[entry["dtype"]], "c", start, shape))
    return found
