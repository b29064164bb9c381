"""Checkpoint files that are whole or not there, checked before they are loaded."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.untrusted import reading, replace_file

REMEDY = "Use an earlier checkpoint"


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written through a temporary file of the same folder and read only if undamaged.

    Lightning writes into the system's temporary folder and moves the file to its place, which on another file system is
    a copy: a kill or a full disk in the middle of it leaves half a file where a whole one was. Here the file and then
    its new name are flushed to disk, so that even a lost machine leaves the old checkpoint or the new one.

    Before a checkpoint is loaded, the CRC-32 that every part of the file carries is compared with the part; torch does
    not, so a flipped bit in a weight would be trained on. It reads the file once more. Remote paths (``s3://...``), and
    folders of sharded checkpoints, are left to Lightning.

    ``ExactResume`` brings it along. Without that callback: ``Trainer(plugins=[SafeCheckpointIO()])``.

    Raises:
        LossplugError: A file can't be written, is damaged, or was replaced since this run wrote it: then two runs share
            a folder, and each would continue from the other's weights.
    """

    def __init__(self) -> None:
        self._written: dict[str, tuple[int, int, int]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint in one step."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path).absolute()
        seen = self._written.get(str(place))
        if seen is not None and place.exists() and _identity(place) != seen:
            raise LossplugError(
                "was replaced since this run wrote it, so another run writes its checkpoints here",
                where=str(place),
                remedy="Give every run a folder of its own",
            )
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LossplugError(
                f"the folder of checkpoints can't be made: {error.strerror or error}", where=str(place.parent)
            ) from None
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        replace_file(place, buffer.getbuffer())
        self._written[str(place)] = _identity(place)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint after :func:`verify_checkpoint`."""
        verify_checkpoint(path)
        return super().load_checkpoint(path, map_location, weights_only)


def verify_checkpoint(path: str | Path) -> None:
    """Compares the parts of a checkpoint file with their checksums; other places and older formats are passed over.

    Raises:
        LossplugError: It is truncated or changed.
    """
    path = Path(path)
    if "://" in str(path) or not path.is_file():
        return
    with reading(path, "the checkpoint is damaged or truncated: it", REMEDY):
        with path.open("rb") as file:
            start = file.read(2)
        if start != b"PK" and start[:1] == b"\x80":  # a pickle of torch before 1.6, which has no checksums
            return
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
    if damaged is not None:
        raise LossplugError(
            f"the checkpoint is damaged: {damaged} has another checksum", where=str(path), remedy=REMEDY
        )


def _identity(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size
