"""The files of a cache of teacher logits: safetensors shards with checksums, and one manifest."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.untrusted import (
    digest,
    member,
    parse_json,
    read_json,
    reading,
    replace_file,
    seal,
    shape_of,
    unseal,
)

MANIFEST, FORMAT = "teacher_cache.json", 1
_TYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}
Manifest = dict[str, Any]


def read_manifest(folder: Path) -> Manifest | None:
    """Returns what a folder's manifest says, or None where there is none.

    Raises:
        LossplugError: It is no manifest.
    """
    path, remedy = folder / MANIFEST, "Make the cache anew"
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except LossplugError as error:
        raise LossplugError(error.what, where=error.where, remedy=remedy) from None
    if found.get("format") != FORMAT:
        raise LossplugError(f"has format {str(found.get('format'))[:40]}, expected {FORMAT}", where=str(path))
    found = unseal(found, path, remedy)
    check_manifest(found, path)
    return found


def check_manifest(found: Manifest, path: Path) -> None:
    """Checks that a manifest has the entries that readers rely on, each of its type, and names files of its folder.

    Raises:
        LossplugError: It hasn't.
    """
    shards = found.get("shards")
    records = shards if isinstance(shards, list) else [None]
    counts = [found.get("samples"), found.get("rows")] if "samples" in found else []
    k, dtype = found.get("k"), found.get("dtype")
    good = (
        isinstance(found.get("teacher"), str)
        and "k" in found
        and dtype in ("float16", "float32")
        and (k is None or _count(k))
    )
    good = good and all(map(_count, counts)) and all(map(_is_record, records))
    good = good and _count(found.get("classes", 0)) and type(found.get("tokens", False)) is bool
    good = good and found.get("ids", "content") in ("content", "given")
    whole = {"classes", "tokens", "ids", "data", "samples", "rows"} <= set(found)
    if not good or (found.get("complete") and not (whole and shards)):
        raise LossplugError(
            "is damaged: an entry is missing or of another type", where=str(path), remedy="Make the cache anew"
        )
    for record in found["shards"]:
        member(path.parent, record["file"])


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    texts = isinstance(record.get("file"), str) and isinstance(record.get("sha256"), str)
    return texts and all(_count(record.get(key)) for key in ("samples", "rows", "bytes"))


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest in one step: a killed run leaves the old one or the new one."""
    replace_file(folder / MANIFEST, (json.dumps(seal(manifest), indent=1) + "\n").encode())


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a shard in one step; returns its record for the manifest."""
    safetensors = require("safetensors.torch", "lightning", "a cache of teacher logits")
    data = safetensors.save({name: t.contiguous() for name, t in tensors.items()})
    path = folder / f"shard-{number:05d}.safetensors"
    replace_file(path, data)
    return {
        "file": path.name,
        "samples": len(tensors["ids"]),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def open_shard(folder: Path, record: dict[str, Any], verify: bool) -> dict[str, Tensor]:
    """Returns the tensors of a shard, mapped from the file: nothing is read before it is used.

    Args:
        folder: The cache.
        record: Of the manifest.
        verify: Whether to read the file once and compare its checksum.

    Raises:
        LossplugError: The file is not there, shorter or longer than it was, or changed.
    """
    remedy = "Run lossplug cache-teacher again: it makes this file anew"
    path = member(folder, record["file"])
    with reading(path, "the shard", remedy):
        size = path.stat().st_size
        if size != record["bytes"]:
            word = "truncated" if size < record["bytes"] else "longer than it was written"
            raise LossplugError(f"is {word}: {size} of {record['bytes']} bytes", where=str(path), remedy=remedy)
        if verify and digest(path) != record["sha256"]:
            raise LossplugError("has another checksum than when it was written", where=str(path), remedy=remedy)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise LossplugError("has a header longer than itself", where=str(path), remedy=remedy)
            header = parse_json(file.read(length), path)
        found = {
            name: _mapped(path, entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"
        }
        _check_tensors(found, record, path)
    return found


def _mapped(path: Path, entry: dict[str, Any], begin: int, size: int) -> Tensor:
    """Returns one tensor of a shard, after comparing what its entry says with the size of the file."""
    shape, kind = shape_of(entry["shape"], path), np.dtype(_TYPES[entry["dtype"]])
    start, end = entry["data_offsets"]
    if not (_count(start) and _count(end)) or end - start != math.prod(shape) * kind.itemsize or begin + end > size:
        raise LossplugError("a tensor has other bytes than its shape needs", where=str(path))
    if 0 in shape:
        return torch.from_numpy(np.empty(shape, kind))
    # copy-on-write: torch wants memory it could write to; the file is never changed
    return torch.from_numpy(np.memmap(path, kind, "c", begin + start, shape))


def _check_tensors(found: dict[str, Tensor], record: dict[str, Any], path: Path) -> None:
    ids = found.get("ids")
    named = {"logits"} <= set(found) or {"top_ids", "log_probs", "rest"} <= set(found)
    good = named and ids is not None and ids.dtype == torch.int64 and ids.shape == (record["samples"],)
    lengths = found.get("lengths")
    if good and lengths is None:
        good = record["rows"] == record["samples"]
    if good and lengths is not None:
        good = lengths.dtype == torch.int64 and lengths.shape == (record["samples"],) and bool((lengths >= 0).all())
        good = good and int(lengths.sum()) == record["rows"]
    rows = [tensor for name, tensor in found.items() if name not in ("ids", "lengths")]
    if not good or any(tensor.ndim != 2 or len(tensor) != record["rows"] for tensor in rows):
        raise LossplugError("holds other tensors than the manifest says", where=str(path))
