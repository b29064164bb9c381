"""The chunked linear head inside a Hugging Face model: training computes its loss without the logits.

While armed, and where gradients are wanted, the output embedding of the model returns a stand-in of its logits
(:class:`~lightning_lossplug.losses.fused.LazyLogits`). The model's own code upcasts, scales, caps, shifts and flattens
it and calls ``F.cross_entropy``, which goes to the chunked head; so label shift, ``num_items_in_batch`` and whatever a
``loss_function`` does around the call stay the model's. ``outputs.logits`` is computed when something reads it.
Evaluation and ``generate`` run without gradients, hence unchanged.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import FusableLoss, Loss
from lightning_lossplug.losses.cross_entropy import CrossEntropy
from lightning_lossplug.losses.fused.lazy import LazyLogits, lazy_logits
from lightning_lossplug.losses.fused.linear import Backend, check_backend, fusable
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method, wrapped_methods

WHERE = "fused head"
NO_FUSED = "Train this model without the fused head"
logger = logging.getLogger(__name__)

Compute = Callable[[FusableLoss | None], Tensor]


def output_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the output embeddings of the Hugging Face models in a module, by path.

    Raises:
        LossplugError: There is none, or one is not a plain linear layer.
    """
    heads: dict[int, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        getter = getattr(type(module), "get_output_embeddings", None)
        head = None if getter is None else getter(module)
        if isinstance(head, nn.Module):
            heads.setdefault(id(head), (path, head))
    if not heads:
        raise LossplugError(
            f"{type(model).__name__} has no output embedding",
            where=WHERE,
            remedy="The fused head is for models with a language-modelling head (get_output_embeddings)",
        )
    names = {id(module): path for path, module in model.named_modules()}
    found = {}
    for key, (path, head) in heads.items():
        name = names.get(key, path)
        if "forward" in wrapped_methods(head):
            raise LossplugError("the output embedding is wrapped by another technique", where=name, remedy=NO_FUSED)
        # A subclass with a weight of its own making (masked, fake-quantised) is fine; one with its own forward is not.
        if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
            raise LossplugError(
                f"the output embedding is a {type(head).__name__} with a forward of its own",
                where=name,
                remedy=NO_FUSED,
            )
        found[name] = head
    return found  # type: ignore[return-value]


class FusedHead:
    """A patched model; made by :func:`attach`. Does nothing until :meth:`arm`.

    Attributes:
        calls: Losses that went to the chunked head since the last :meth:`arm`.
        computed: For which operations logits were computed in spite of the fused head, and how often.
        dropped_smoothing: Label smoothing of a replaced call, which goes with it.
        last: Detached value of the last loss.
        engine: Back end that computed it, as ``fused_linear`` names them; empty before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss | None,
        combine: Callable[[Compute], Tensor] | None,
        backend: Backend = "auto",
    ) -> None:
        check_backend(backend, None)
        self.loss, self.backend = None if loss is None else fusable(loss), backend
        self.engine = ""
        self.combine = combine
        self.calls = 0
        self.computed: Counter[str] = Counter()
        self.dropped_smoothing = 0.0
        self.last: Tensor | None = None
        self._armed = False
        self._heads = output_heads(model)
        for head in self._heads.values():
            wrap_method(head, "forward", self, self._forward_of(head))

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the patched heads."""
        return tuple(self._heads)

    def arm(self) -> None:
        """Turns the fused head on."""
        self._armed, self.calls = True, 0

    def disarm(self) -> None:
        """Turns it off: the model computes its logits."""
        self._armed = False

    @contextmanager
    def armed(self) -> Iterator[FusedHead]:
        """On inside the ``with`` block."""
        self.arm()
        try:
            yield self
        finally:
            self.disarm()

    def remove(self) -> None:
        """Takes the patch off the model."""
        self.disarm()
        for head in self._heads.values():
            unwrap_method(head, "forward", self)
        self._heads = {}

    def require_calls(self) -> None:
        """Raises :class:`LossplugError` when no loss went to the chunked head since :meth:`arm`, saying why."""
        if self.calls:
            return
        if self.computed:
            reason = f"the model applies {', '.join(sorted(self.computed))} to its logits before the loss"
        else:
            reason = f"no cross-entropy of the output of {', '.join(self._heads)} was computed"
        raise LossplugError(reason, where=WHERE, remedy=NO_FUSED)

    def _forward_of(self, head: nn.Linear) -> Callable[..., Any]:
        @torch.compiler.disable
        def forward(inner: Callable[..., Tensor], input: Tensor) -> Tensor:
            if not self._armed or not torch.is_grad_enabled() or isinstance(input, LazyLogits):
                return inner(input)
            weight, bias = head.weight, head.bias
            if not any(t is not None and t.requires_grad for t in (input, weight, bias)):
                return inner(input)
            return lazy_logits(input, weight, bias, cross_entropy=self._cross_entropy, on_compute=self._on_compute)

        return forward

    def _on_compute(self, name: str) -> None:
        if self._armed and not self.computed[name]:
            logger.info("fused head: %r needs the logits, so they are computed", name)
        self.computed[name] += 1

    def _cross_entropy(self, logits: LazyLogits | Tensor, options: dict[str, Any]) -> Tensor:
        self.calls += isinstance(logits, LazyLogits)

        def compute(loss: FusableLoss | None) -> Tensor:
            return self._value(logits, loss, **options)

        value = compute(self.loss) if self.combine is None else self.combine(compute)
        self.last = value.detach()
        return value

    def _value(
        self,
        logits: LazyLogits | Tensor,
        loss: FusableLoss | None,
        *,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        """The loss in the place of a call, with the call's reduction, and its weight and ignored label unless set."""
        if loss is None:
            if not isinstance(logits, LazyLogits):
                return F.cross_entropy(logits, target, weight, None, ignore_index, None, reduction, label_smoothing)
            loss = CrossEntropy(label_smoothing, weight, ignore_index)
        elif label_smoothing:
            self.dropped_smoothing = label_smoothing
        weight = weight if loss.weight is None else loss.weight
        ignore_index = ignore_index if ignore_index != -100 else loss.ignore_index
        if isinstance(logits, LazyLogits):
            options = {"class_weight": weight, "ignore_index": ignore_index, "reduction": reduction}
            value = logits.loss(loss, target, backend=self.backend, **options)
            self.engine = logits._lazy.call.engine
            return value
        return loss(logits, target, weight=weight, ignore_index=ignore_index, reduction=reduction)


def attach(
    model: nn.Module,
    loss: str | Loss | None = None,
    *,
    combine: Callable[[Compute], Tensor] | None = None,
    backend: Backend = "auto",
) -> FusedHead:
    """Puts the chunked head into a Hugging Face model (or a module that holds one).

    Args:
        model: Has, or contains modules that have, ``get_output_embeddings``.
        loss: Fusable loss (name or object) in the place of the cross-entropies of the logits; None: as they are called.
        combine: Makes the value from several losses of the same logits: called with a function that computes a fusable
            loss (None: the one that was called for), e.g. ``lambda of: 0.5 * of(focal) + 0.5 * of(None)``.
        backend: As for ``fused_linear``.

    Returns:
        The handle: ``arm()``, ``disarm()``, ``armed()`` as a context, ``remove()``, ``require_calls()``.

    Raises:
        LossplugError: No output embedding, one that is more than a linear layer, or a loss that needs the logits.
    """
    return FusedHead(model, loss, combine, backend)
