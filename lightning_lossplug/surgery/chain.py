"""One patch per method of an object, however many techniques wrap it.

Techniques that each saved and restored a method would leave patches behind, since they are torn down in the order in
which they were set up, not in reverse. A chain patches once, orders its wrappers by phase whatever the order in which
they came, and puts the method back when the last wrapper leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

Wrapper = Callable[..., Any]
Watcher = Callable[[str, object], None]

_ABSENT = object()
_WATCHERS: list[Watcher] = []

# Outside the modules: a deep copy of a module in the middle of a fit (weight averaging) must not copy callbacks.
_CHAINS: WeakKeyDictionary[nn.Module, dict[str, MethodChain]] = WeakKeyDictionary()


class MethodChain:
    """All wrappers around one method of one module; a wrapper is called as ``wrapper(inner, *args, **kwargs)``."""

    def __init__(self, owner: nn.Module, name: str, look_through: bool) -> None:
        self.original = getattr(owner, name)
        self.wrappers: dict[object, tuple[int, Wrapper]] = {}

        def call(*args: Any, **kwargs: Any) -> Any:
            function = self.original
            for key, (_, wrapper) in self._innermost_first():
                function = functools.partial(_told(name, key, wrapper) if _WATCHERS else wrapper, function)
            return function(*args, **kwargs)

        # Lightning reads the signature of training_step through __wrapped__; for configure_model it must not look
        # through, or it takes the method as not overridden and never calls it.
        before = dict(vars(owner))
        setattr(owner, name, functools.wraps(self.original)(call) if look_through else call)
        # What the assignment changed: the attribute itself, or what a property of the class keeps it in. It was there
        # before on a compiled LightningModule, whose methods are instance attributes.
        self.changed = {k: before.get(k, _ABSENT) for k, v in vars(owner).items() if before.get(k, _ABSENT) is not v}

    def restore(self, owner: nn.Module) -> None:
        """Puts the method back."""
        for key, value in self.changed.items():
            if value is _ABSENT:
                del vars(owner)[key]
            else:
                vars(owner)[key] = value

    def _innermost_first(self) -> list[tuple[object, tuple[int, Wrapper]]]:
        return sorted(self.wrappers.items(), key=lambda item: item[1][0])[::-1]


def watch_chains(watcher: Watcher) -> Callable[[], None]:
    """Calls ``watcher(method, key)`` before every wrapper that runs; returns a function that ends it."""
    _WATCHERS.append(watcher)

    def end() -> None:
        if watcher in _WATCHERS:
            _WATCHERS.remove(watcher)

    return end


def _told(name: str, key: object, wrapper: Wrapper) -> Wrapper:
    def tell(*args: Any, **kwargs: Any) -> Any:
        for watcher in _WATCHERS:
            watcher(name, key)
        return wrapper(*args, **kwargs)

    return tell


def wrap_method(
    owner: nn.Module, name: str, key: object, wrapper: Wrapper, *, order: int = 0, look_through: bool = True
) -> None:
    """Adds a wrapper around ``owner.name``.

    Args:
        owner: The module whose method is wrapped.
        name: The method.
        key: Identifies the wrapper; the same key replaces it.
        wrapper: Called as ``wrapper(inner, *args, **kwargs)``; ``inner`` runs the rest of the chain.
        order: Position; lower is further out. Equal orders: first added is outermost.
        look_through: Keep the signature and ``__wrapped__`` of the original visible.
    """
    chains = _CHAINS.setdefault(owner, {})
    if name not in chains:
        chains[name] = MethodChain(owner, name, look_through)
    chains[name].wrappers[key] = (order, wrapper)


def unwrap_method(owner: nn.Module, name: str, key: object) -> None:
    """Removes a wrapper; with the last one the method is as it was. Unknown keys are ignored."""
    chain = _CHAINS.get(owner, {}).get(name)
    if chain is None:
        return
    chain.wrappers.pop(key, None)
    if chain.wrappers:
        return
    chain.restore(owner)
    del _CHAINS[owner][name]
    if not _CHAINS[owner]:
        del _CHAINS[owner]


def wrapped_methods(owner: nn.Module) -> tuple[str, ...]:
    """Returns the names of the methods of ``owner`` that are wrapped now."""
    return tuple(_CHAINS.get(owner, {}))
