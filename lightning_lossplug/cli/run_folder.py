"""The folder of a training run: checked before anything starts, removed again if nothing was trained."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_lossplug.errors import LossplugError


@contextmanager
def run_folder(trainer: Trainer) -> Iterator[Path | None]:
    """Guards the folder a Trainer writes to; None where that is no local folder.

    A mistake that shows only when the Trainer sets up (a layer M doesn't divide, a step without a loss to swap) then
    leaves nothing behind. What existed before is never touched.

    Raises:
        LossplugError: The folder can't be written.
    """
    place = trainer.log_dir or trainer.default_root_dir
    if trainer.fast_dev_run or "://" in str(place):  # type: ignore[attr-defined]
        yield None
        return
    folder = Path(place).absolute()
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    require_folder(folder)
    try:
        yield folder
    except BaseException:
        if trainer.global_step == 0 and trainer.is_global_zero and new and new[0] == folder:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in new[1:]:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
        raise


def require_folder(folder: Path) -> None:
    """Checks that a folder can be made and written to, without making it.

    Raises:
        LossplugError: It can't.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".lossplug-"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise LossplugError(
            f"the output folder can't be written: {reason}", where=str(folder), remedy="Choose another folder"
        ) from None
