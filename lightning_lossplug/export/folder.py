"""Writing a folder whole or not at all: staged beside its place, flushed to disk, renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.untrusted import read_json, record_files, seal, sync, unseal, verify_files

MANIFEST = "lossplug.json"


def clear_target(output: Path, *, overwrite: bool) -> None:
    """Checks that a folder may be written.

    Args:
        output: Where the artifact goes.
        overwrite: Whether an artifact that is there may be replaced.

    Raises:
        LossplugError: It is a file, it holds something and ``overwrite`` is off, or it holds something that is no
            artifact, which is never replaced.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise LossplugError("is no folder", where=str(output), remedy="Choose another output")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise LossplugError(
            "the folder is not empty", where=str(output), remedy="Choose another one, or add --overwrite"
        )
    if not (output / MANIFEST).is_file():
        raise LossplugError(
            f"the folder holds files but no {MANIFEST}, so it is no artifact and won't be replaced",
            where=str(output),
            remedy="Choose another one",
        )


@contextmanager
def artifact_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside ``output``; when the block ends well, it takes the place of ``output``.

    An exception, or the end of the process, leaves what was at ``output`` as it was. The check that the place can be
    written happens before the block runs.

    Args:
        output: Where the artifact goes; missing parents are made.
        overwrite: Whether an artifact that is there may be replaced.

    Raises:
        LossplugError: The place is taken, or can't be written.
    """
    output = Path(output).absolute()
    clear_target(output, overwrite=overwrite)
    made = [path for path in output.parents if not path.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    except OSError as error:
        _remove_empty(made)
        reason = error.strerror or str(error)
        raise LossplugError(f"the output folder can't be written: {reason}", where=str(output)) from None
    try:
        yield stage
        _flush(stage)
        _take_place(stage, output)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, LossplugError) and error.where and str(stage) in error.where:
            where = error.where.replace(str(stage), str(output))
            raise LossplugError(error.what, where=where, remedy=error.remedy) from None
        # libraries that write through safetensors hand its error on, which is no OSError
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
            raise LossplugError(f"the artifact can't be written: {reason}", where=str(output)) from error
        raise


def write_manifest(stage: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a staged artifact, with size and SHA-256 of every other file under ``files``."""
    text = json.dumps(seal({**manifest, "files": record_files(stage)}), indent=2) + "\n"
    (stage / MANIFEST).write_text(text, encoding="utf-8")


def read_artifact_manifest(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """Returns the manifest of an artifact.

    Args:
        folder: The artifact.
        verify: Compare size and checksum of every file that the manifest lists, which reads them once.

    Raises:
        FileNotFoundError: There is none.
        LossplugError: It is damaged, or a file is missing, truncated or changed.
    """
    manifest = read_json(folder / MANIFEST)
    remedy = "Export or download it again"
    manifest = unseal(manifest, folder / MANIFEST, remedy)
    if verify:
        verify_files(folder, manifest.get("files"), remedy)
    return manifest


def _take_place(stage: Path, output: Path) -> None:
    old = None
    if output.is_dir() and any(output.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
        os.rename(output, old)  # onto an empty folder, which POSIX allows
    try:
        os.rename(stage, output)
    except BaseException:
        if old is not None:
            os.rename(old, output)
        raise
    sync(output.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in (*sorted(folder.rglob("*")), folder):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)  # staging files are private, an artifact isn't
        sync(path)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
