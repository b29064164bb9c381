"""Swapping the loss that a training step computes, without editing the step.

Three places are known. A *functional call*: every ``F.cross_entropy`` in the step (``nn.CrossEntropyLoss`` calls it,
and so do the loss functions of transformers), ``F.nll_loss``, ``F.mse_loss`` … goes to the new loss, with the call's
own ``weight``, ``ignore_index`` and ``reduction``. A *criterion*: a module attribute with arithmetic of its own
(``self.criterion = timm.loss.LabelSmoothingCrossEntropy()``), called as ``criterion(prediction, target)``. And the
``loss_function`` of a Hugging Face model, inside which the functional calls are swapped and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.losses.base import ClassificationLoss, Loss
from lightning_lossplug.losses.token_values import TokenValueLoss
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method

Mode = Literal["replace", "add"]

# Which functional calls a loss can stand in for, by its call signature.
CALLS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "logits_index": (F.cross_entropy, F.nll_loss),
    "logits_soft": (F.cross_entropy,),
    "token_logits_values": (F.cross_entropy, F.nll_loss),
    "binary_logits": (F.binary_cross_entropy_with_logits,),
    "regression": (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
}
FUNCTIONAL = ("auto", "functional", "loss_function")


class LossSwap:
    """Puts a loss in the place of (or beside) the one a module computes, while :meth:`armed`.

    Args:
        loss: The new loss.
        signature: How it is called (the registry's ``signature``): decides which functional calls it can replace.
        mode: ``replace``: ``w new + (1 - w) old``; ``add``: ``old + w new``.
        where: ``auto`` (functional calls, and criteria with their own arithmetic), ``functional``, ``loss_function``
            (of a Hugging Face model), or the path of an attribute such as ``criterion``.
        call: Which of the step's functional calls, counted from 0 among those the loss fits; None: all of them. For
            models with several heads.
    """

    def __init__(
        self, loss: Loss, signature: str, mode: Mode = "replace", where: str = "auto", call: int | None = None
    ) -> None:
        if mode not in ("replace", "add"):
            raise LossplugError(f"mode is {mode!r}", where="SwapLoss", remedy="Use 'replace' or 'add'")
        if mode == "replace" and isinstance(loss, TokenValueLoss) and where in FUNCTIONAL:
            raise LossplugError(
                f"{type(loss).__name__} sees only tokens that have a value and cannot replace the loss",
                where="SwapLoss",
                remedy="Add it with mode='add', or name the attribute of a term it replaces with where=",
            )
        self.loss, self.signature, self.mode, self.where = loss, signature, mode, where
        if call is not None and (call < 0 or where not in FUNCTIONAL):
            raise LossplugError(
                f"call={call} with where={where!r}",
                where="SwapLoss",
                remedy=f"call counts functional calls from 0, with where one of {', '.join(FUNCTIONAL)}",
            )
        self.call, self.seen = call, 0
        self.weight: float = 1.0
        self.index: Tensor | None = None  # sample ids of the batch, for a loss that keeps a value per sample
        self.calls = 0  # swapped calls since the last arming
        self.dropped_smoothing = 0.0  # label smoothing of a replaced call, which goes with it
        self.last: dict[str, Tensor] = {}  # detached terms of the last swapped call
        self.sites: list[str] = []
        self._armed = False
        self._busy = False  # inside a swapped call: what it calls itself is not swapped again
        self._patched: list[tuple[nn.Module, str]] = []

    def rivals(self, other: LossSwap) -> bool:
        """Tells whether both would replace the same calls."""
        if "add" in (self.mode, other.mode) or self.where != other.where:
            return False
        if self.where not in FUNCTIONAL:
            return True
        same_call = self.call == other.call or None in (self.call, other.call)
        return same_call and bool(set(CALLS.get(self.signature, ())) & set(CALLS.get(other.signature, ())))

    def attach(self, module: nn.Module) -> None:
        """Finds the places in a module.

        Raises:
            LossplugError: ``where`` names an attribute that isn't there, or no functional call fits the loss.
        """
        self.detach()
        functional = CALLS.get(self.signature, ())
        if self.where in ("auto", "functional") and functional:
            self.sites.append(f"calls of {', '.join('F.' + f.__name__ for f in functional)}")
        if self.where == "auto":
            for path, criterion in module.named_modules():
                if path and is_criterion(criterion):
                    self._patch(criterion, "forward", self._criterion_call)
                    self.sites.append(f"the criterion {path!r} ({type(criterion).__name__})")
        elif self.where == "loss_function":
            owners = [(path, m) for path, m in module.named_modules() if callable(getattr(m, "loss_function", None))]
            if not owners or not functional:
                raise LossplugError(
                    "no sub-module has a loss_function",
                    where="SwapLoss",
                    remedy="Use where='auto' or an attribute's path",
                )
            paths = [path for path, _ in owners]
            for path, owner in owners:
                if any(path.startswith(f"{outer}.") or not outer for outer in paths if outer != path):
                    continue  # the base model inside a task model has the attribute too, and doesn't call it
                self._patch(owner, "loss_function", self._scoped_call)
                self.sites.append(f"{path}.loss_function".lstrip("."))
        elif self.where != "functional":
            owner, name, value = _attribute(module, self.where)
            if isinstance(value, nn.Module):
                self._patch(value, "forward", self._criterion_call)
            else:
                self._patch(owner, name, self._criterion_call)
            self.sites.append(f"the attribute {self.where!r}")
        if not self.sites:
            raise LossplugError(
                f"a {self.signature!r} loss replaces no functional call, and no criterion attribute was found",
                where="SwapLoss",
                remedy="Name the attribute that computes the loss: SwapLoss(..., where='criterion')",
            )

    def detach(self) -> None:
        """Removes every patch."""
        for owner, name in self._patched:
            unwrap_method(owner, name, self)
        self._patched.clear()
        self.sites.clear()

    @contextmanager
    def armed(self, weight: float = 1.0, index: Tensor | None = None) -> Iterator[None]:
        """Swaps inside the ``with`` block, a training step.

        Args:
            weight: Weight of the new loss now.
            index: Sample ids of the batch.
        """
        self.weight, self.index, self.calls, self.seen, self._armed = weight, index, 0, 0, True
        try:
            if self.where in ("auto", "functional") and self.signature in CALLS:
                with _listening(self):
                    yield
            else:
                yield
        finally:
            self._armed, self.index = False, None

    def require_calls(self) -> None:
        """Raises :class:`LossplugError` when nothing was swapped since :meth:`armed`, naming what was looked for."""
        if self.calls == 0 and self.call is not None and self.seen:
            raise LossplugError(
                f"call={self.call}, but the training step computed only {self.seen} losses that could be swapped",
                where="SwapLoss",
                remedy="Calls count from 0, in the order of the step",
            )
        if self.calls == 0:
            raise LossplugError(
                f"the training step computed no loss that could be swapped; looked for {', '.join(self.sites)}",
                where="SwapLoss",
                remedy="Name the attribute that computes it, SwapLoss(..., where='criterion'), or call F.cross_entropy",
            )

    def _patch(self, owner: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
        # A term is added around what takes the place of the old loss, whatever the order of the callbacks.
        wrap_method(owner, name, self, wrapper, order=-1 if self.mode == "add" else 0)
        self._patched.append((owner, name))

    def _criterion_call(self, inner: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not self._armed or self._busy or _Listener.computing:
            return inner(*args, **kwargs)
        return self.combine(lambda: inner(*args, **kwargs), *args, **kwargs)

    def _scoped_call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._armed or self._busy:
            return inner(*args, **kwargs)
        with _listening(self):
            return inner(*args, **kwargs)

    def combine(self, old: Callable[[], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss that takes the place of a call."""
        self.calls += 1
        if self.index is not None:
            kwargs["index"] = self.index
        new = _Listener.compute(lambda: self.loss(*args, **kwargs))
        before = None
        if self.mode == "add" or self.weight != 1:
            self._busy = True
            try:
                before = old()
            finally:
                self._busy = False
        self.last = {"new": new.detach().mean()}
        if before is None:
            return new
        self.last["old"] = before.detach().mean()
        return before + self.weight * new if self.mode == "add" else self.weight * new + (1 - self.weight) * before


class _Listener(TorchFunctionMode):
    """Sends functional calls to the swaps that want them: one listener for all swaps of a step.

    A replacing swap takes the call, adding ones put their terms around it, whatever the order in which they came.
    """

    current: ClassVar[_Listener | None] = None
    computing: ClassVar[bool] = False  # a new loss is being computed: what it calls itself is not swapped

    def __init__(self) -> None:
        super().__init__()
        self.swaps: list[LossSwap] = []

    @classmethod
    def compute(cls, loss: Callable[[], Tensor]) -> Tensor:
        """Runs a new loss, none of whose own calls are swapped."""
        before, cls.computing = cls.computing, True
        try:
            return loss()
        finally:
            cls.computing = before

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = [] if self.computing else [s for s in self.swaps if not s._busy and func in CALLS[s.signature]]
        chosen = []
        for swap in wanted:
            if swap.call in (None, swap.seen):
                chosen.append(swap)
            swap.seen += 1
        replacing = [s for s in chosen if s.mode == "replace"]
        if len(replacing) > 1:
            names = " and ".join(type(s.loss).__name__ for s in replacing)
            raise LossplugError(
                f"{names} both replace the same call of F.{func.__name__}",
                where="SwapLoss",
                remedy="Give one of them mode='add', or each its own call= or where=",
            )
        result = functools.partial(func, *args, **kwargs)
        if chosen:
            call = _bind(func, *args, **kwargs)
            for swap in (*replacing, *(s for s in chosen if s.mode == "add")):
                result = functools.partial(_swapped, swap, call, result)
        return result()


def _swapped(swap: LossSwap, call: dict[str, Any], old: Callable[[], Tensor]) -> Tensor:
    if call["label_smoothing"] and swap.mode == "replace":
        swap.dropped_smoothing = call["label_smoothing"]
    logits = call["input"]
    if isinstance(swap.loss, TokenValueLoss) and logits.ndim > 2:
        logits = logits.movedim(1, -1)  # torch has the classes second, the loss has them last
    return swap.combine(old, logits, call["target"], **_options(swap.loss, call))


@contextmanager
def _listening(swap: LossSwap) -> Iterator[None]:
    """Lets a swap hear functional calls inside the ``with`` block."""
    listener = _Listener.current
    if listener is not None:
        listener.swaps.append(swap)
        try:
            yield
        finally:
            listener.swaps.remove(swap)
        return
    _Listener.current = listener = _Listener()
    listener.swaps.append(swap)
    try:
        with listener:
            yield
    finally:
        _Listener.current = None


def _bind(func: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a functional loss by name, with defaults for those a function lacks."""
    code = func.__code__
    names = code.co_varnames[: code.co_argcount]
    call: dict[str, Any] = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
    call.update(zip(names, args, strict=False))
    call.update(kwargs)
    for deprecated in ("size_average", "reduce"):
        if call.get(deprecated) is not None:
            raise LossplugError(
                f"the replaced call uses the deprecated {deprecated}=", where="SwapLoss", remedy="Use reduction="
            )
    return call


def _options(loss: Loss, call: dict[str, Any]) -> dict[str, Any]:
    """What the replaced call decides: its reduction, and weight and ignored label unless the new loss has its own."""
    options: dict[str, Any] = {"reduction": call["reduction"]}
    if isinstance(loss, ClassificationLoss):
        if loss.weight is None and call["weight"] is not None:
            options["weight"] = call["weight"]
        if call["ignore_index"] != -100:
            options["ignore_index"] = call["ignore_index"]
    elif isinstance(loss, TokenValueLoss):
        options["ignore_index"] = call["ignore_index"]  # class weights stay with the call, beside which this is a term
    elif call["weight"] is not None:
        raise LossplugError(
            f"the replaced call weights its elements, which {type(loss).__name__} cannot carry over", where="SwapLoss"
        )
    elif call["ignore_index"] != -100:
        options["ignore_index"] = call["ignore_index"]
    return options


def is_criterion(module: nn.Module) -> bool:
    """Tells a loss module with arithmetic of its own by its name; torch's are swapped through their functional call."""
    name = type(module).__name__
    named = name.endswith(("Loss", "CrossEntropy", "Criterion")) and not isinstance(module, Loss)
    return named and not type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())


def _attribute(module: nn.Module, path: str) -> tuple[nn.Module, str, Any]:
    parent, _, name = path.rpartition(".")
    try:
        owner = module.get_submodule(parent)
        value = getattr(owner, name)
    except AttributeError:
        known = [
            n for n, m in module.named_modules() if n and (is_criterion(m) or isinstance(m, nn.modules.loss._Loss))
        ]
        known += [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        remedy = suggestion(path, known) if known else "Use where='auto' to swap functional calls"
        raise LossplugError(f"the module has no attribute {path!r}", where="SwapLoss", remedy=remedy) from None
    if not callable(value):
        raise LossplugError(f"the attribute {path!r} is a {type(value).__name__}, not callable", where="SwapLoss")
    return owner, name, value
