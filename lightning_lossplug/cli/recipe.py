"""The callbacks of a recipe file, built without running anything that the file could bring along.

A recipe names classes. Those of this project and of ``lightning.pytorch.callbacks`` are built; any other import has to
be allowed by whoever runs it, since importing a module runs its code.
"""

from __future__ import annotations

import re
import typing
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_lossplug.cli.config_errors import condense
from lightning_lossplug.cli.fit import short_names
from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.recipes import config_names, config_path
from lightning_lossplug.registry import registry

MAX_BYTES, MAX_NODES = (
    1 << 20,
    10_000,
)  # far above any recipe; a few bytes of YAML aliases can stand for millions of nodes
TRUSTED = ("lightning_lossplug", "lightning.pytorch.callbacks")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain types, and every key once: the later of two would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise LossplugError(f"gives the key {twice[0][:80]!r} twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def recipe_path(name: str) -> Path:
    """Returns the file of a recipe: a path, or the name of a packaged one.

    Raises:
        LossplugError: Neither.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise LossplugError("there is no such file", where=name)
        return path.resolve()
    if name in config_names():
        return config_path(name)
    raise LossplugError(f"there is no recipe {name!r}", remedy=suggestion(name, config_names()))


def read_recipe(path: Path, allowed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Returns the callbacks a recipe names, as ``{"class_path": ..., "init_args": {...}}``.

    Args:
        path: YAML with a list ``callbacks``, or a configuration of ``lossplug fit`` (its ``trainer.callbacks``).
        allowed: Modules, besides this project's and Lightning's callbacks, that may be imported.

    Raises:
        LossplugError: Not readable, no such list, a class outside the allowed modules.
    """
    where = str(path)
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= MAX_BYTES else ""
    except (OSError, UnicodeDecodeError) as error:
        raise LossplugError(f"can't be read ({type(error).__name__})", where=where) from None
    if size > MAX_BYTES:
        raise LossplugError(f"is no recipe: {size} bytes, {MAX_BYTES} at most", where=where)
    try:
        config = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except LossplugError as error:
        raise LossplugError(error.what, where=where) from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # PyYAML's own constructors raise most of these, for "!!timestamp x" say
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1})" if mark else ""
        raise LossplugError(f"is no valid YAML{at}", where=where) from None
    entries = _callbacks(config, where)
    for _ in _nodes(entries, where):
        pass
    return [_entry(entry, where, tuple(allowed)) for entry in entries]


def build_callbacks(entries: list[dict[str, Any]], where: str) -> list[Any]:
    """Builds the callbacks of :func:`read_recipe`, new ones at every call.

    Raises:
        LossplugError: A setting a callback doesn't have, or a value it refuses.
    """
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    try:
        parsed = parser.parse_object({"callbacks": entries})
        return list(parser.instantiate_classes(parsed).callbacks)
    except (ValueError, TypeError, ArgumentError, ImportError) as error:
        found = condense(error, ["callbacks"], {"callbacks": short_names()["trainer.callbacks"]})
        if found.where and found.where.startswith("callbacks"):
            where = f"{where}: {found.where}"
        raise LossplugError(found.what, where=where, remedy=found.remedy) from error


def _callbacks(config: Any, where: str) -> list[Any]:
    if not isinstance(config, dict):
        raise LossplugError("is no mapping of keys to values", where=where)
    trainer = config.get("trainer")
    inner = trainer.get("callbacks") if isinstance(trainer, dict) else None
    if inner is not None and config.get("callbacks") is not None:
        raise LossplugError("has callbacks at the top and under trainer", where=where, remedy="Keep one of the lists")
    found = config.get("callbacks") if inner is None else inner
    if isinstance(found, (dict, str)):
        found = [found]
    if not isinstance(found, list) or not found:
        raise LossplugError(
            "names no callbacks", where=where, remedy="Give a list: callbacks: [{class_path: SwapLoss}]"
        )
    return found


def _nodes(value: Any, where: str) -> Iterator[Any]:
    waiting, seen = [(value, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        if seen > MAX_NODES or depth > 50:
            raise LossplugError(f"is no recipe: more than {MAX_NODES} values, or 50 levels", where=where)
        yield node
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        waiting += [(child, depth + 1) for child in children]


def _entry(entry: Any, where: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    entry = {"class_path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        raise LossplugError(
            f"{str(entry)[:80]!r} names no callback", where=where, remedy="Give class_path and init_args"
        )
    if unknown := set(entry) - {"class_path", "init_args"}:
        key = min(map(str, unknown))
        raise LossplugError(f"unknown key {key!r}", where=where, remedy=suggestion(key, ["class_path", "init_args"]))
    arguments = entry.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise LossplugError(f"init_args of {entry['class_path']} is no mapping", where=where)
    name = _class_path(entry["class_path"], where, allowed)
    for node in _nodes(arguments, where):
        if isinstance(node, dict) and "class_path" in node:
            _check_import(str(node["class_path"]), where, allowed)
    importable = _importing_parameters(name)
    for key, value in arguments.items():
        for node in _nodes(value, where) if key in importable else ():
            if isinstance(node, str) and DOTTED.fullmatch(node):
                _check_import(node, f"{where}: {key}", allowed)
    return {"class_path": name, "init_args": arguments}


def _class_path(name: str, where: str, allowed: tuple[str, ...]) -> str:
    if "." in name:
        _check_import(name, where, allowed)
        return name
    import lightning.pytorch.callbacks

    if name in lightning.pytorch.callbacks.__all__:
        return f"lightning.pytorch.callbacks.{name}"
    try:
        cls = registry.get("callback", name).load()
    except LossplugError as error:
        known = short_names()["trainer.callbacks"]
        if name in known:  # known, but an optional package is missing
            raise
        raise LossplugError(f"unknown callback {name!r}", where=where, remedy=suggestion(name, known)) from error
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_import(name: str, where: str, allowed: tuple[str, ...]) -> None:
    if not any(name == module or name.startswith(f"{module}.") for module in TRUSTED + allowed):
        raise LossplugError(
            f"names {name!r}, whose import would run code that is not this project's",
            where=where,
            remedy=f"If you trust it: --allow-import {name.split('.')[0]}",
        )


def _importing_parameters(class_path: str) -> set[str]:
    """Returns the parameters for which a dotted string would be imported: they take functions, classes or objects."""
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError):
        raise LossplugError(f"there is no class {class_path!r}") from None
    hints = typing.get_type_hints(cls.__init__)
    return {key for key, hint in hints.items() if any(map(_is_object, _leaves(hint)))}


def _leaves(hint: Any) -> Iterator[Any]:
    origin = typing.get_origin(hint)
    if origin in (type, Callable) or hint in (type, Callable):
        yield Callable
    for inner in typing.get_args(hint):
        if origin not in (typing.Literal, type, Callable):
            yield from _leaves(inner)
    if origin is None:
        yield hint


def _is_object(hint: Any) -> bool:
    plain = (str, int, float, bool, bytes, dict, list, tuple, set, type(None), Path)
    return hint is not Any and hint not in plain
