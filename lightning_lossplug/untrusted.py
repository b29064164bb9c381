"""Files that somebody else may have written, or that a disk has damaged: the right value or one line.

Nothing here unpickles or imports what a file names. Sizes are checked before memory is taken, names before a path is
made of them, and everything that reading can raise becomes one :class:`LossplugError` that names the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError, require

MAX_JSON = 64 << 20  # bytes of a manifest; a cache of a thousand million samples has one of a few MB
MAX_VALUES = 1 << 40  # values of one tensor
MAX_AXES = 16


@contextmanager
def reading(where: str | Path, what: str = "the file", remedy: str | None = None) -> Iterator[None]:
    """Turns whatever a damaged or forged file makes its reader raise into one line.

    Args:
        where: The file.
        what: What it is, for the message.
        remedy: What to do.

    Raises:
        LossplugError: The block raised an exception, which is named; one of these passes as it is.
    """
    try:
        yield
    except LossplugError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        text = reason[:160] or type(error).__name__
        raise LossplugError(f"{what} can't be read ({text})", where=str(where), remedy=remedy) from None


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """Returns what JSON says, without the liberties that Python's parser takes.

    Raises:
        LossplugError: No JSON, a key twice in one object, NaN or infinity, nested too deeply.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise LossplugError("holds a key twice in one object", where=str(where))
        return found

    def refuse(name: str) -> None:
        raise LossplugError(f"holds {name}, which is no JSON", where=str(where))

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except LossplugError:
        raise
    except (ValueError, RecursionError) as error:
        raise LossplugError(f"is no JSON ({str(error)[:120]})", where=str(where)) from None


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Returns the JSON object of a file.

    Args:
        path: The file.
        limit: Bytes it may have.

    Raises:
        FileNotFoundError: There is none.
        LossplugError: It is larger, can't be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LossplugError(f"can't be read: {error.strerror or error}", where=str(path)) from None
    if len(text) > limit:
        raise LossplugError(f"is larger than {limit} bytes", where=str(path))
    found = parse_json(text, path)
    if not isinstance(found, dict):
        raise LossplugError("holds no JSON object", where=str(path))
    return found


def member(folder: Path, name: Any) -> Path:
    """Returns the path of a file that a manifest names: one directly in the folder or below it, and no link out of it.

    Raises:
        LossplugError: Another name.
    """
    plain = isinstance(name, str) and name and "\0" not in name and "\\" not in name
    parts = name.split("/") if plain else []
    if not parts or any(part in ("", ".", "..") for part in parts) or Path(name).is_absolute():
        raise LossplugError(f"names the file {str(name)[:80]!r}, which is none inside it", where=str(folder))
    path = folder / name
    with reading(path):
        outside = not path.resolve().is_relative_to(folder.resolve())
    if outside:
        raise LossplugError(f"{name!r} is a link to somewhere else", where=str(folder))
    return path


def shape_of(value: Any, where: str | Path) -> tuple[int, ...]:
    """Returns the shape that a file gives.

    Raises:
        LossplugError: No list of whole numbers from 0, or too many axes or values.
    """
    ok = isinstance(value, (list, tuple)) and len(value) <= MAX_AXES
    if not ok or not all(type(size) is int and size >= 0 for size in value) or math.prod(value) > MAX_VALUES:
        raise LossplugError(f"{str(value)[:80]} is no shape", where=str(where))
    return tuple(value)


def read_safetensors(path: Path, purpose: str, remedy: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the text pairs of a safetensors file.

    Args:
        path: The file.
        purpose: What for, if the package is missing.
        remedy: What to do if it is damaged.

    Raises:
        LossplugError: There is none, or it is damaged.
    """
    safetensors = require("safetensors", "lightning", purpose)
    if not path.is_file():
        raise LossplugError("there is no such file", where=str(path))
    with (
        reading(path, "the file may be truncated: it", remedy),
        safetensors.safe_open(path, framework="pt") as file,
    ):
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Writes a file in one step: a killed run, a full disk and a lost machine leave the old one or the new one.

    A kill can leave ``.NAME.part`` beside it, which the next writer of the same file takes over.

    Raises:
        LossplugError: It can't be written, or another process is writing it; what was there stays.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        handle = _open_part(part, path)
        try:
            with open(handle, "wb", closefd=False) as file:
                file.write(data)
            os.fsync(handle)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
        finally:
            os.close(handle)
        sync(path.parent)
    except OSError as error:
        raise LossplugError(f"can't be written: {error.strerror or error}", where=str(path)) from None


def _open_part(part: Path, path: Path) -> int:
    """Opens the file beside ``path``, empty and locked: what a killed process left is free, another writer's is not."""
    while True:
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(part)):  # else its writer gave it the final name meanwhile
                os.ftruncate(handle, 0)
                return handle
        except BlockingIOError:
            os.close(handle)
            raise LossplugError(
                "is being written by another process", where=str(path), remedy="Give every run a folder of its own"
            ) from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Returns one SHA-256 over the names, dtypes, shapes and bytes of tensors on the CPU."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def seal(plain: dict[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with the SHA-256 of its contents under ``sha256``, against damage (not against forgery)."""
    return {**plain, "sha256": _digest_json(plain)}


def unseal(found: Any, where: str | Path, remedy: str | None = None) -> dict[str, Any]:
    """Returns what :func:`seal` was given.

    Raises:
        LossplugError: It was changed since, or never sealed.
    """
    rest = {key: value for key, value in found.items() if key != "sha256"} if isinstance(found, dict) else {}
    if not isinstance(found, dict) or found.get("sha256") != _digest_json(rest):
        raise LossplugError("is damaged: it has another checksum than written", where=str(where), remedy=remedy)
    return rest


def _digest_json(plain: dict[str, Any]) -> str:
    # through text, so that tuples and lists, or whole keys and their names, are the same before and after the file
    text = json.dumps(json.loads(json.dumps(plain)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def record_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns bytes and SHA-256 of every file below a folder, by name, for its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files
    }


def verify_files(folder: Path, records: Any, remedy: str | None = None) -> None:
    """Compares the files of a folder with :func:`record_files`.

    Raises:
        LossplugError: One is missing, shorter, longer or changed; it is named.
    """
    if not isinstance(records, dict):
        raise LossplugError("the manifest's list of files is none", where=str(folder), remedy=remedy)
    for name, record in records.items():
        path = member(folder, name)
        with reading(path, remedy=remedy):
            wanted, sha256 = record["bytes"], record["sha256"]
            size = path.stat().st_size
            same = size == wanted and digest(path) == sha256
        if not same:
            word = f"has {size} bytes, {wanted} were written" if size != wanted else "has another checksum than written"
            raise LossplugError(f"is damaged: it {word}", where=str(path), remedy=remedy)
