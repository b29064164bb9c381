"""Reading what a sub-module got and gave, without touching it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError, suggestion

INPUT = "input:"  # "input:fc" is what fc gets, "fc" what it gives


class Call(NamedTuple):
    """One call of a sub-module.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What it returned.
        version: Count of in-place changes of a tensor output at that moment.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    version: int


class Tap:
    """Keeps the calls of one sub-module while armed; nothing of the module is changed.

    Args:
        root: The module that holds it.
        path: Its path, as in ``named_modules``; ``input:PATH`` to read its first input as the feature.
        where: Who asks, for messages.
        with_grad_only: Pass over calls made without gradients (a teacher inside the step, generation).

    Raises:
        LossplugError: There is no such sub-module.
    """

    def __init__(self, root: nn.Module, path: str, where: str, with_grad_only: bool = True) -> None:
        self.path, self.where, self.with_grad_only = path, where, with_grad_only
        self.reads_input = path.startswith(INPUT)
        self.module = find_submodule(root, path.removeprefix(INPUT), where)
        self.calls: list[Call] = []
        self._armed, self._strict = False, with_grad_only
        self._handle = self.module.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._armed and (torch.is_grad_enabled() or not self._strict):
            value = _first(args, kwargs) if self.reads_input else output
            version = value._version if isinstance(value, Tensor) and not value.is_inference() else 0
            self.calls.append(Call(args, kwargs, value, version))

    def arm(self, with_grad_only: bool | None = None) -> None:
        """Keeps calls from now on; earlier ones are forgotten."""
        self.calls, self._armed = [], True
        self._strict = self.with_grad_only if with_grad_only is None else with_grad_only

    def disarm(self) -> None:
        """Keeps no more calls."""
        self._armed = False

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Keeps calls inside the ``with`` block."""
        self.arm()
        try:
            yield
        finally:
            self.disarm()

    def last(self) -> Call:
        """Returns the last call.

        Raises:
            LossplugError: There was none, or its output was changed in place afterwards.
        """
        if not self.calls:
            raise LossplugError(
                f"{self.path!r} ({type(self.module).__name__}) was never called in the step",
                where=self.where,
                remedy="Name a sub-module that the training step calls (not one whose weight it reads)",
            )
        call = self.calls[-1]
        if isinstance(call.output, Tensor) and not call.output.is_inference() and call.output._version != call.version:
            raise LossplugError(
                f"the output of {self.path!r} was changed in place after it was read",
                where=self.where,
                remedy="Set inplace=False on the activation behind it, or name that activation",
            )
        return call

    def forget(self) -> None:
        """Lets go of the kept tensors."""
        self.calls = []

    def remove(self) -> None:
        """Takes the hook off."""
        self._handle.remove()
        self.forget()


@contextmanager
def all_armed(taps: list[Tap]) -> Iterator[None]:
    """Arms several taps."""
    with ExitStack() as stack:
        for tap in taps:
            stack.enter_context(tap.armed())
        yield


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def find_submodule(root: nn.Module, path: str, where: str) -> nn.Module:
    """Returns a sub-module by path.

    Raises:
        LossplugError: There is none; the message suggests near ones.
    """
    try:
        return root.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in root.named_modules() if name]
        raise LossplugError(
            f"{type(root).__name__} has no sub-module {path!r}", where=where, remedy=suggestion(path, known)
        ) from None


def find_student(module: nn.Module, path: str | None, where: str) -> str:
    """Returns the path of the student's network in a module: the given one, or the only child with parameters.

    Raises:
        LossplugError: There is no such sub-module, or several could be meant.
    """
    if path is not None:
        find_submodule(module, path, where)
        return path
    found = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    found = [name for name in found if name != "lossplug_loss"]
    if len(found) != 1:
        what = f"has {len(found)} children with parameters ({', '.join(found)})" if found else "has no child to hook"
        raise LossplugError(
            f"{type(module).__name__} {what}",
            where=where,
            remedy="Say student='PATH' of the one that returns the logits",
        )
    return found[0]
