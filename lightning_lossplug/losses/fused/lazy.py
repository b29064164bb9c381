"""Logits of a linear head that are not computed until something reads them.

A :class:`LazyLogits` stands where a model expects its logits. What models do between head and loss (upcast, scale,
softcap, cut the last position, flatten, drop padded columns, add a bias) is noted down; ``F.cross_entropy`` of it
goes to the chunked head. Anything else computes the logits and goes on with them: the values, and the gradients of
whatever is made from them, are those of the plain model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.cross_entropy import CrossEntropy
from lightning_lossplug.losses.fused.lazy_rules import METADATA, RULES, WRITES, Form
from lightning_lossplug.losses.fused.linear import head_loss

WHERE = "fused head"


@dataclass
class HeadCall:
    """One call of the head, shared by all stand-ins that come from it.

    Args:
        hidden: Input of the head, [..., D].
        weight: Classifier [V, D], as it was at the call.
        bias: [V] or None.
        cross_entropy: Computes ``F.cross_entropy`` of a stand-in from the call's arguments by name.
        on_compute: Told the name of the operation for which logits had to be computed.
        engine: Back end of the last loss, or empty.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    cross_entropy: Callable[[LazyLogits | Tensor, dict[str, Any]], Tensor]
    on_compute: Callable[[str], None]
    autocast: tuple[bool, torch.dtype] = (False, torch.float32)
    versions: tuple[int, ...] = ()
    engine: str = ""

    def __post_init__(self) -> None:
        kind = self.hidden.device.type
        self.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self.versions = self._versions()

    def _versions(self) -> tuple[int, ...]:
        return tuple(t._version for t in (self.weight, self.bias) if t is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits."""
        enabled, dtype = self.autocast
        return dtype if enabled and self.hidden.dtype != torch.float64 else self.hidden.dtype

    def precision(self) -> torch.autocast:
        """The autocast of the call."""
        return torch.autocast(self.hidden.device.type, dtype=self.autocast[1], enabled=self.autocast[0])

    def require_same_weight(self) -> None:
        """Raises :class:`LossplugError` when the weight has been updated since the call."""
        if self._versions() != self.versions:
            raise LossplugError(
                "logits are read after the weights of their head changed",
                where=WHERE,
                remedy="Read or detach outputs.logits before the optimizer's step",
            )


@dataclass
class _State:
    call: HeadCall
    form: Form
    compute: Callable[[], Tensor]
    dense: Tensor | None = field(default=None)


class LazyLogits(torch.Tensor):
    """Stand-in of logits [..., V]; made by :func:`lazy_logits`."""

    _lazy: _State

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notes a known operation down, or computes the logits and goes on with them."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.__repr__:
            return f"LazyLogits(shape={tuple(args[0].shape)}, dtype={args[0].dtype})"
        if func is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        if func in RULES and isinstance(args[0], LazyLogits):
            form = RULES[func](args[0]._lazy.form, func, *args[1:], **kwargs)
            if form is not None:
                return args[0]._derive(form, func, *args[1:], **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in WRITES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None:
            raise LossplugError(
                f"{name!r} writes into the logits, which the fused head does not compute",
                where=WHERE,
                remedy="Train this model without the fused head",
            )
        return func(*_computed(args, name), **_computed(kwargs, name))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What reaches the dispatcher (from a custom autograd function, say) gets the computed logits."""
        name = str(func)
        return func(*_detached(args, name), **_detached(kwargs or {}, name))

    def _derive(self, form: Form, func: Callable[..., Any], *args: Any, **kwargs: Any) -> LazyLogits:
        """The stand-in of ``func(self, ...)``."""
        return _stand_in(_State(self._lazy.call, form, lambda: func(self.compute(), *args, **kwargs)))

    def compute(self, reason: str | None = None) -> Tensor:
        """Returns the logits, with the graph that leads to hidden states and weight; computed once."""
        state = self._lazy
        if state.dense is None:
            if reason is not None:
                state.call.on_compute(reason)
            with torch.enable_grad():
                state.dense = state.compute()
        return state.dense

    def loss(self, loss: str | Loss, target: Tensor, **options: Any) -> Tensor:
        """Returns a fusable loss of these logits [..., V] at class indices [...].

        Args:
            loss: As for :func:`~lightning_lossplug.losses.fused.fused_linear`.
            target: Class indices.
            options: Of ``fused_linear``, without ``return_lse``.
        """
        state = self._lazy
        form = state.form
        if not form.fusable:
            raise LossplugError(
                f"the softcap of these logits is {form.outer}, not > 0", where=WHERE, remedy="Compute them"
            )
        state.call.require_same_weight()
        scale = form.factor if form.outer is None else form.factor * form.outer
        hidden, bias = form.hidden, form.bias
        if scale != 1:
            hidden, bias = hidden * scale, None if bias is None else bias * scale
        with state.call.precision():
            found = head_loss(hidden, form.weight, target, loss, bias=bias, softcap=form.outer, **options)
        state.call.engine = found.engine
        return found.value.to(torch.promote_types(self.dtype, torch.float32))


class _Stand(torch.autograd.Function):
    """Gives a stand-in its place in the graph, for what does not go through ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], dtype: torch.dtype, state: _State, *inputs: Tensor) -> Tensor:
        ctx.state, ctx.inputs = state, inputs
        return LazyLogits._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=inputs[0].device)  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state: _State = ctx.state
        with torch.enable_grad():
            dense = state.compute()
        wanted = [t for t in ctx.inputs if t.requires_grad]
        found = iter(torch.autograd.grad(dense, wanted, grad, allow_unused=True, retain_graph=True))
        return None, None, None, *(next(found) if t.requires_grad else None for t in ctx.inputs)


def _stand_in(state: _State) -> LazyLogits:
    call, form = state.call, state.form
    inputs = [t for t in (call.hidden, call.weight, call.bias) if t is not None]
    made: LazyLogits = _Stand.apply(form.shape, form.dtype, state, *inputs)
    made._lazy = state
    return made


def lazy_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cross_entropy: Callable[[LazyLogits | Tensor, dict[str, Any]], Tensor] | None = None,
    on_compute: Callable[[str], None] | None = None,
) -> LazyLogits:
    """Returns a stand-in of ``F.linear(hidden, weight, bias)``.

    Args:
        hidden: [..., D].
        weight: [V, D].
        bias: [V].
        cross_entropy: Takes the place of ``F.cross_entropy``: called with the logits (a stand-in that can be fused, or
            computed ones) and the call's arguments by name. Default: the loss as it was called.
        on_compute: Called with the name of an operation that needs computed logits.
    """
    call = HeadCall(hidden, weight, bias, cross_entropy or as_called, on_compute or (lambda name: None))

    def compute() -> Tensor:
        call.require_same_weight()
        with call.precision():
            return F.linear(hidden, weight, bias)

    return _stand_in(_State(call, Form(hidden, weight, bias, call.dtype), compute))


def as_called(logits: LazyLogits | Tensor, options: dict[str, Any]) -> Tensor:
    """The cross-entropy that was called for, fused where possible."""
    if not isinstance(logits, LazyLogits):
        return F.cross_entropy(logits, **options)
    loss = CrossEntropy(options["label_smoothing"], options["weight"], options["ignore_index"], options["reduction"])
    return logits.loss(loss, options["target"])


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    options = {
        "target": target,
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    if size_average is not None or reduce is not None:
        raise LossplugError("cross_entropy with the deprecated size_average=", where=WHERE, remedy="Use reduction=")
    options["target"] = _computed(target, "cross_entropy (of targets)")
    if not isinstance(input, LazyLogits):
        return F.cross_entropy(input, **options)
    state = input._lazy
    # For [N, V] and [V] the classes are last; for [N, C, d] torch takes another dimension.
    if not state.form.fusable or input.ndim > 2 or options["target"].is_floating_point():
        return state.call.cross_entropy(_computed(input, "cross_entropy"), options)
    return state.call.cross_entropy(input, options)


def _computed(tree: Any, reason: str) -> Any:
    return tree_map_only(LazyLogits, lambda logits: logits.compute(reason), tree)


def _detached(tree: Any, reason: str) -> Any:
    return tree_map_only(LazyLogits, lambda logits: logits.compute(reason).detach(), tree)
