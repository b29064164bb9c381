"""Recipe files: complete configurations of ``lossplug fit``, to run as they are or to copy and change.

``lossplug fit --recipe NAME`` takes one of them; options after it override its values.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lightning_lossplug.errors import LossplugError, suggestion


def config_names() -> list[str]:
    """Returns the names of the recipe files."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def config_path(name: str) -> Path:
    """Returns the file of a recipe.

    Raises:
        LossplugError: There is no recipe file of that name.
    """
    path = _folder() / f"{name}.yaml"
    if name not in config_names():
        raise LossplugError(f"there is no recipe file {name!r}", remedy=suggestion(name, config_names()))
    return path


def config_title(name: str) -> str:
    """Returns the first line of a recipe file, a comment that says what it trains."""
    return config_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()


def _folder() -> Path:
    return Path(str(files(__name__)))
