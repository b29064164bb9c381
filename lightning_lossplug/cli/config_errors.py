"""What jsonargparse says over ten lines, in one: which key, what is wrong with it, the nearest known name.

Its exceptions carry text only, so the text is read; whatever has an unknown form is passed on in its first line.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module

from lightning_lossplug.errors import LossplugError, suggestion

TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def condense(error: BaseException, options: list[str], classes: dict[str, list[str]]) -> LossplugError:
    """Returns the mistake behind an exception of jsonargparse.

    Args:
        error: The exception.
        options: Known keys in dotted form, without dashes.
        classes: ``{key: short names of classes}`` for the keys that take a class.
    """
    for cause in chain(error):
        if isinstance(cause, LossplugError):
            return cause
    text = str(error)
    key = _first(r'Parser key "([^"]+)"', text)
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        return _unknown_argument(found.group(1), options)
    if found := re.search(r"(?:does not accept|Option) '?(?:option )?'([^']+)'", text):
        return _unknown_key(found.group(1), key, _first(r"class_path '([^']+)'", text), options)
    if (name := _first(r"Expected a dot import path string: (\S+)", text)) is not None:
        kind = {"model": "model", "data": "data module"}.get(str(key), "class")
        return LossplugError(
            f"unknown {kind} {name!r}", where=key, remedy=suggestion(name, classes.get(str(key)) or ["a dotted path"])
        )
    if (module := _first(r"(No module named '[^']+')", text)) is not None:
        given = _first(r"class_path '([^']+)'", text)
        return LossplugError(f"{given or 'the class'} can't be imported: {module}", where=key)
    if (file := _first(r"File does not exist: '?([^'\n]+)", text)) is not None:
        return LossplugError("there is no such file", where=file)
    if "arguments are required" in text:
        missing = [name.strip().removeprefix("fit.") for name in text.partition(":")[2].split(",")]
        names = " and ".join(f"--{name}" for name in missing)
        return LossplugError(f"{names} missing", remedy="Give --config FILE, --recipe NAME or the options themselves")
    if choices := re.findall(r"'?([^',\s\[\]]+)'?", ",".join(re.findall(r"Expected a typing\.Literal\[(.*)\]", text))):
        given = _first(r"Given value: (.+)", text) or ""
        return LossplugError(f"{given!r} is none of its values", where=key, remedy=suggestion(given, set(choices)))
    if (wanted := _first(r"Expected a <class '([^']+)'>", text)) is not None:
        inner = re.findall(r'Parser key "([^"]+)"', text)
        given = _first(r"Got value: (.+)", text) or _first(r"Given value: (.+)", text)
        where = inner[-1] if len(inner) < 2 else f"{inner[0]}: {inner[-1]}"
        return LossplugError(f"expected {TYPES.get(wanted, wanted)}, got {given!r}", where=where)
    if text.startswith("Problems parsing config"):
        line = re.findall(r"line (\d+)", text)
        at = f" (line {line[-1]})" if line else ""
        return LossplugError(f"the config is no valid YAML{at}: {_tidy(text.partition(':')[2])}")
    if text.startswith("Unexpected config"):
        return LossplugError("the config is no mapping of keys to values")
    return LossplugError(_tidy(text) or type(error).__name__)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception and what led to it."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        now = waiting.pop(0)
        if now is not None and id(now) not in seen:
            seen.add(id(now))
            yield now
            waiting += [now.__cause__, now.__context__]


def _unknown_argument(given: str, options: list[str]) -> LossplugError:
    name = given.partition("=")[0]
    if not name.startswith("-"):
        return LossplugError(f"unexpected argument {name!r}", remedy="See: lossplug fit --help")
    return LossplugError(f"unknown option {name}", remedy=suggestion(name, [f"--{option}" for option in options]))


def _unknown_key(name: str, key: str | None, class_path: str | None, options: list[str]) -> LossplugError:
    if class_path is None:
        return LossplugError(f"unknown key {name!r}", where="config", remedy=suggestion(name, options))
    head = name.partition(".")[0]
    short = class_path.rpartition(".")[2]
    if short in ("LightningModule", "LightningDataModule", "Callback"):  # what is taken where no class_path was given
        known = ["class_path", "init_args"]
        return LossplugError(f"unknown key {head!r}", where=key, remedy=suggestion(head, known))
    return LossplugError(f"{short} has no option {head!r}", where=key, remedy=suggestion(head, _arguments(class_path)))


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found.group(1) if found else None


def _tidy(text: str) -> str:
    return " ".join(text.split())[:200]
