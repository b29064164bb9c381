"""One registry for everything that has a name: losses, recipes, schedules, callbacks, models, data, exporters.

A thing is registered where it is defined::

    @register("loss", "focal", family="classification", paper="...", arxiv="1708.02002")
    class Focal(RowLoss): ...

Third parties register theirs with an entry point of the group ``lightning_lossplug``; each entry names a module
(importing it registers) or a function without arguments that registers.
"""

from __future__ import annotations

import importlib
import inspect
import keyword
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from lightning_lossplug.errors import LossplugError, suggestion

T = TypeVar("T", bound=Callable[..., Any])

ENTRY_POINT_GROUP = "lightning_lossplug"

# Rooms whose import registers what they hold. The outer rooms register by dotted path in a light ``__init__``, which
# imports their optional packages only when something is created.
BUILTIN_MODULES = (
    "lightning_lossplug.schedules",
    "lightning_lossplug.losses",
    "lightning_lossplug.distillation",
    "lightning_lossplug.sparsity",
    "lightning_lossplug.quantization",
    "lightning_lossplug.communication",
    "lightning_lossplug.kv_cache",
    "lightning_lossplug.metrics",
    "lightning_lossplug.callbacks",
    "lightning_lossplug.integrations",
)


@dataclass(frozen=True)
class Parameter:
    """One argument of a registered thing, under its public name."""

    name: str
    default: Any
    annotation: str
    required: bool


@dataclass(frozen=True)
class Entry:
    """What is known of a registered name.

    Args:
        kind: ``loss``, ``recipe`` (of N:M sparsity), ``mask``, ``score``, ``transform``, ``optimizer``, ``function``,
            ``activation`` (thresholds), ``quantizer``, ``post_training``, ``teacher``, ``compressor``,
            ``error_feedback`` and ``local_update`` (of gradients), ``schedule``, ``callback``, ``strategy``,
            ``plugin``, ``model``, ``data``, ``metric`` or ``exporter``.
        name: The name on the method card.
        factory: Builds the thing; or its dotted path, imported at first use.
        family: The group shown by ``lossplug list``.
        paper: Title of the source.
        arxiv: arXiv id of the source, if any.
        aliases: Other names accepted by :meth:`Registry.get`.
        signature: How the thing is called, as in the cards' table (``logits_index`` ...).
        facts: Whatever else a runner wants to know (``fusable``, ``gather``, ``needs`` ...).
    """

    kind: str
    name: str
    factory: Callable[..., Any] | str
    family: str
    paper: str = ""
    arxiv: str | None = None
    aliases: tuple[str, ...] = ()
    signature: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """Dotted path of the module that defines the factory."""
        return self.factory.rpartition(".")[0] if isinstance(self.factory, str) else self.factory.__module__

    def load(self) -> Callable[..., Any]:
        """Returns the factory, importing its module when it was registered by path."""
        if isinstance(self.factory, str):
            module, _, attribute = self.factory.rpartition(".")
            return getattr(importlib.import_module(module), attribute)
        return self.factory

    def parameters(self) -> list[Parameter]:
        """Returns the arguments of the factory under their public names (``lambda_`` is shown as ``lambda``)."""
        found = []
        for item in inspect.signature(self.load()).parameters.values():
            if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
                continue
            required = item.default is item.empty
            annotation = (
                "" if item.annotation is item.empty else str(getattr(item.annotation, "__name__", item.annotation))
            )
            found.append(Parameter(public_name(item.name), None if required else item.default, annotation, required))
        return found


def public_name(argument: str) -> str:
    """Undoes the underscore that keeps a Python keyword usable as an argument: ``lambda_`` -> ``lambda``."""
    return argument[:-1] if argument.endswith("_") and keyword.iskeyword(argument[:-1]) else argument


class Registry:
    """Names to factories, grouped by kind; refuses duplicates, suggests near misses."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self._aliases: dict[tuple[str, str], str] = {}
        self._loaded = False
        self._lock = threading.RLock()

    def add(self, entry: Entry) -> None:
        """Adds an entry.

        Raises:
            LossplugError: The name or an alias is taken by something else.
        """
        for name in (entry.name, *entry.aliases):
            taken = self._find(entry.kind, name)
            if taken is not None:
                raise LossplugError(
                    f"the {entry.kind} name {name!r} is registered twice, by {taken.module} and {entry.module}",
                    remedy="Rename one; if both are the same file, import it as lightning_lossplug.… only",
                )
        self._entries[entry.kind, entry.name] = entry
        for alias in entry.aliases:
            self._aliases[entry.kind, alias] = entry.name

    def get(self, kind: str, name: str) -> Entry:
        """Returns the entry of a name or alias.

        Raises:
            LossplugError: Unknown name; the message suggests the nearest ones.
        """
        self.load()
        entry = self._find(kind, name)
        if entry is None:
            names = [e.name for e in self if e.kind == kind]
            if not names:
                kinds = sorted({e.kind for e in self})
                raise LossplugError(f"unknown kind {kind!r}", remedy=suggestion(kind, kinds))
            raise LossplugError(f"unknown {kind} {name!r}", remedy=suggestion(name, names))
        return entry

    def create(self, kind: str, name: str, /, **parameters: Any) -> Any:
        """Builds a registered thing from the card's parameter names.

        Raises:
            LossplugError: Unknown name, a parameter it doesn't have, or one it needs that is missing.
        """
        entry = self.get(kind, name)
        known = {parameter.name: parameter for parameter in entry.parameters()}
        arguments = {}
        for key, value in parameters.items():
            if public_name(key) not in known:
                raise LossplugError(
                    f"{kind} {entry.name!r} has no parameter {key!r}", remedy=suggestion(key, known or {"(none)"})
                )
            arguments[f"{key}_" if keyword.iskeyword(key) else key] = value
        given = {public_name(key) for key in arguments}
        missing = [key for key, parameter in known.items() if parameter.required and key not in given]
        if missing:
            raise LossplugError(
                f"{kind} {entry.name!r} needs the parameter {missing[0]!r}", remedy=f"lossplug show {entry.name}"
            )
        return entry.load()(**arguments)

    def load(self) -> None:
        """Imports the built-in rooms and calls the entry points of third parties, once."""
        with self._lock:
            if self._loaded:
                return
            self._loaded = True  # set first: the rooms below may look names up while they are imported
            for module in BUILTIN_MODULES:
                importlib.import_module(module)
            for point in entry_points(group=ENTRY_POINT_GROUP):
                try:
                    plugin = point.load()
                    if callable(plugin):
                        plugin()
                except LossplugError:
                    raise
                except Exception as error:
                    raise LossplugError(
                        f"the plug-in failed to load: {type(error).__name__}: {error}",
                        where=f"entry point {point.name!r} ({point.value})",
                        remedy="Mend or uninstall that package",
                    ) from error

    def __iter__(self) -> Iterator[Entry]:
        self.load()
        return iter(sorted(self._entries.values(), key=lambda e: (e.kind, e.family, e.name)))

    def _find(self, kind: str, name: str) -> Entry | None:
        return self._entries.get((kind, self._aliases.get((kind, name), name)))


registry = Registry()


def register(
    kind: str,
    name: str,
    *,
    family: str,
    paper: str = "",
    arxiv: str | None = None,
    aliases: tuple[str, ...] = (),
    signature: str | None = None,
    **facts: Any,
) -> Callable[[T], T]:
    """Class or function decorator that adds a factory to the registry; see :class:`Entry` for the arguments."""

    def add(factory: T) -> T:
        registry.add(Entry(kind, name, factory, family, paper, arxiv, aliases, signature, facts))
        return factory

    return add


def register_path(
    kind: str, name: str, path: str, *, family: str, aliases: tuple[str, ...] = (), paper: str = ""
) -> None:
    """Registers a factory by dotted path, for things whose module needs an optional package."""
    registry.add(Entry(kind, name, path, family, paper, None, aliases))
