"""What every Trainer in this environment calls when it is made: nothing, unless ``lossplug run`` started the process.

Registered under the entry point ``lightning.pytorch.callbacks_factory``, so the import of this file is paid by every
Trainer of every project here: it imports the standard library only, and the rest when asked.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "LOSSPLUG_RUN"


@dataclass(frozen=True)
class Request:
    """What ``lossplug run`` or ``check`` asks of the Trainers below it, in an environment variable.

    Args:
        recipe: The recipe's file.
        allowed: Modules the recipe may import from.
        mark: File that says that a Trainer was found.
        report: Of ``check``: the file for what was seen. None: an ordinary run.
        steps: Of ``check``: steps to measure.
        plain: Of ``check``: measure without the recipe's callbacks.
    """

    recipe: str
    mark: str
    allowed: list[str] = field(default_factory=list)
    report: str | None = None
    steps: int = 0
    plain: bool = False

    def environment(self) -> dict[str, str]:
        """Returns this process's environment with the request in it."""
        return {**os.environ, VARIABLE: json.dumps(asdict(self))}


def request() -> Request | None:
    """Returns what this process was asked, or None."""
    text = os.environ.get(VARIABLE)
    return Request(**json.loads(text)) if text else None


def callbacks() -> list[Any]:
    """Returns the recipe's callbacks, new ones for every Trainer; an empty list without ``lossplug run``.

    Raises:
        LossplugError: The recipe has changed since ``lossplug run`` read it, and is wrong now.
    """
    asked = request()
    if asked is None:
        return []
    from lightning_lossplug.cli.recipe import build_callbacks, read_recipe

    built = [] if asked.plain else build_callbacks(read_recipe(Path(asked.recipe), asked.allowed), asked.recipe)
    if asked.report is not None:
        from lightning_lossplug.cli.dry_run import DryRun

        built = [*built, DryRun(Path(asked.report), asked.steps, built)]
    _mark(asked, "added")
    return built


def foreign_callbacks() -> list[Any]:
    """The same entry point of the package ``pytorch_lightning``, whose Trainer takes no callbacks of ``lightning``.

    Raises:
        LossplugError: ``lossplug run`` started this process.
    """
    asked = request()
    if asked is None:
        return []
    from lightning_lossplug.errors import LossplugError

    _mark(asked, "foreign")
    raise LossplugError(
        "the script's Trainer is that of the package pytorch_lightning, these callbacks are for the package lightning",
        remedy="Import lightning.pytorch in the script instead",
    )


def _mark(asked: Request, what: str) -> None:
    with Path(asked.mark).open("a", encoding="utf-8") as out:
        out.write(what + "\n")
