"""One run per folder of checkpoints, for as long as the run lives."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_lossplug.errors import LossplugError

_HELD: set[int] = set()


def _let_go() -> None:
    # A lock belongs to all processes that have the folder open: workers of a loader that outlive a killed run for some
    # seconds would keep the run that resumes it out.
    for handle in _HELD:
        with suppress(OSError):
            os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


class FolderLocks:
    """Locks on the folders into which a Trainer's callbacks write checkpoints; a killed process loses its own.

    The folders themselves are locked (``flock``), so nothing is left in them. Remote folders, and file systems that
    can't lock a folder, are passed over.
    """

    def __init__(self) -> None:
        self._handles: list[int] = []

    def take(self, trainer: Trainer) -> None:
        """Locks the folders, on rank 0; every process is told the same.

        Raises:
            LossplugError: A run that lives writes its checkpoints into one of them.
        """
        busy = None
        if trainer.is_global_zero:
            savers = [c for c in trainer.callbacks if isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
            given = {str(getattr(saver, "dirpath", None) or "://") for saver in savers}
            places = sorted({str(Path(place).absolute()) for place in given if "://" not in place})
            busy = next((place for place in places if not self._lock(place)), None)
        busy = trainer.strategy.broadcast(busy)
        if busy is not None:
            self.release()
            raise LossplugError(
                "another run is writing its checkpoints here", where=busy, remedy="Give every run a folder of its own"
            )

    def _lock(self, place: str) -> bool:
        """Returns False where another run holds the lock."""
        try:
            os.makedirs(place, exist_ok=True)
            handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # the writer of checkpoints says what is wrong with the place
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:
            os.close(handle)
            return True
        self._handles.append(handle)
        _HELD.add(handle)
        return True

    def release(self) -> None:
        """Gives the folders back."""
        for handle in self._handles:
            if handle in _HELD:  # else this is a fork, which closed it
                _HELD.discard(handle)
                os.close(handle)
        self._handles.clear()
