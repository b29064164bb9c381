"""What Lightning and others say while a command runs: information to stdout, hints nobody asked for nowhere.

The standard error stays for the one line of a mistake.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

NOISE = (
    "Seed set to",
    "Loading `train_dataloader`",
    "GPU available",
    "TPU available",
    "HPU available",
    "💡",
    "`Trainer.fit` stopped",
    "\nDetected Keyboard",
)


class _Stdout(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not text.startswith(NOISE):
            print(text, file=sys.stdout, flush=True)


@contextmanager
def lightning_output(level: int = logging.INFO) -> Iterator[None]:
    """Sends the messages of Lightning (and warnings, one line each) to stdout while a command runs.

    Args:
        level: Messages below it are dropped; from ``logging.ERROR`` on warnings are dropped, too.
    """
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    names = ("lightning.pytorch", "lightning.fabric", "lightning_utilities", "timm", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [_Stdout()], False
        logger.setLevel(level if logger.name.startswith("lightning") else logging.ERROR)
    with warnings.catch_warnings():
        if level >= logging.ERROR:
            warnings.simplefilter("ignore")
        for category in (PossibleUserWarning, DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.showwarning = _show
        try:
            yield
        finally:
            for logger, handlers, old, propagate in before:
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(old)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stdout, flush=True)
