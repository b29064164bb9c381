"""What the commands print and write: tables on a terminal, JSON for programs."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_lossplug.errors import LossplugError, require

PIPE_WIDTH = 200  # columns when the output is no terminal


def console() -> Any:
    """Returns a rich console on the standard output.

    Raises:
        LossplugError: rich is not installed.
    """
    rich = require("rich.console", "cli", "the lossplug command")
    found = rich.Console(highlight=False)
    found.on_broken_pipe = _broken_pipe
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = PIPE_WIDTH
    return found


def _broken_pipe() -> NoReturn:
    raise BrokenPipeError  # rich would end the process with 1


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    cut: Sequence[str] = (),
) -> Any:
    """Returns a rich table.

    Args:
        title: Shown above it.
        columns: Headers; all empty for none.
        rows: Cells, as text with rich markup.
        right: Headers of the columns that are numbers.
        cut: Headers of the columns that give way when the lines are too long: their cells are cut off, the other
            columns keep their width.
    """
    box = require("rich.box", "cli", "the lossplug command")
    text = require("rich.text", "cli", "the lossplug command").Text
    made = require("rich.table", "cli", "the lossplug command").Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    made.show_header = any(columns)
    for column in columns:
        kept = bool(cut) and column not in cut
        made.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=kept)
    for row in rows:
        cells: list[Any] = list(row)
        for index in (i for i, column in enumerate(columns) if column in cut):
            cells[index] = text.from_markup(row[index], overflow="ellipsis")
            cells[index].no_wrap = True  # of the cell, not of the column, which would keep its width
        made.add_row(*cells)
    return made


def plain(text: str) -> str:
    """Escapes text for a cell: brackets in it are no markup."""
    return require("rich.markup", "cli", "the lossplug command").escape(text)


def jsonable(value: Any) -> Any:
    """Returns a value as JSON can hold it; anything JSON has no form for becomes its ``repr``."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return repr(value)


def to_json(value: Any) -> str:
    """Returns a value as readable JSON text."""
    return json.dumps(jsonable(value), indent=2, ensure_ascii=False)


def require_writable(path: Path) -> None:
    """Checks that a file can be written at ``path``, without leaving anything behind.

    Raises:
        LossplugError: It can't.
    """
    if path.is_dir():
        raise LossplugError("is a folder, expected a file to write", where=str(path))
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise LossplugError(
            f"can't write there: {error.strerror or error}", where=str(path), remedy="Choose another folder"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        LossplugError: It can't be written.
    """
    require_writable(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def bytes_text(count: float) -> str:
    """Returns a size for people: ``1.43 MB`` (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def progress() -> Any:
    """Returns a rich progress bar for a ``with`` block: ``track(iterable, total=, description=)``; silent in a pipe."""
    bars = require("rich.progress", "cli", "the lossplug command")
    out = console()
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    return bars.Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
