"""The one error type of the project: what is wrong, where, and what to do."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType


class LossplugError(ValueError):
    """A mistake a person can mend, in one line.

    Args:
        what: What is wrong, with the value that was given.
        where: The module path, file or argument it concerns.
        remedy: What to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        text = f"{where}: {what}" if where else what
        text = f"{text}. {remedy}" if remedy else text
        super().__init__(" ".join(text.splitlines()))  # a name read from a file may hold a line break

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.remedy)


def _rebuild(cls: type[LossplugError], what: str, where: str | None, remedy: str | None) -> LossplugError:
    return cls(what, where=where, remedy=remedy)


def suggestion(given: str, known: Iterable[str]) -> str:
    """Returns a sentence that names the closest known names, or the first 20 of them when none is close.

    Case, hyphens and underscores make no difference: ``BD-KD`` is close to ``bdkd``.
    """
    known = sorted(known)
    bare: dict[str, list[str]] = {}
    for name in known:
        bare.setdefault(_bare(name), []).append(name)
    close = [name for key in get_close_matches(_bare(given), bare, n=3, cutoff=0.55) for name in bare[key]][:3]
    if close:
        return "Did you mean " + " or ".join(repr(name) for name in close) + "?"
    rest = f" … ({len(known)} in all)" if len(known) > 20 else ""
    return "Known: " + ", ".join(known[:20]) + rest


def _bare(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Imports an optional package, or says in one line which extra brings it.

    Raises:
        LossplugError: The package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise
        raise LossplugError(
            f"{purpose} needs the package {package!r}, which is not installed",
            remedy=f"Install it with: pip install 'lightning_lossplug[{extra}]'",
        ) from None
