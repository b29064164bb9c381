"""AdamW for optimizers that treat masked weights in a way of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.sparsity.bits import flat_bits, pack_rows
from lightning_lossplug.surgery.shards import local

# Entries per operation on a CPU: the five tensors of an update fit the cache, so that only its first pass waits for
# memory.
_PIECE = 1 << 15


class Together(NamedTuple):
    """Masked weights that are updated by the same operations: lists of equal length."""

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    bits: list[Tensor]  # of the masks, each as one row
    steps: list[float]  # taken so far, the coming one included


class MaskedAdamW(Optimizer):
    """AdamW that knows which of its parameters are masked; the others get torch's AdamW, bit for bit.

    ``NMSparsity`` tells the masks before every step; a loop of one's own calls :meth:`take_masks`. On an accelerator
    the masked weights are updated by multi-tensor operations, on a CPU in pieces that fit the cache.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate > 0, or 0.
        betas: Decay of the two moments, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled weight decay >= 0.

    Raises:
        LossplugError: A value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        where = type(self).__name__
        for name, value, ok in (
            ("lr", lr, lr >= 0),
            ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not ok:
                raise LossplugError(f"{name} is {value}", where=where, remedy="See the ranges in its documentation")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.masks: dict[nn.Parameter, Tensor] = {}
        self.pull = 0.0

    def take_masks(self, masks: dict[nn.Parameter, Tensor], pull: float = 0.0) -> None:
        """Says which parameters are masked.

        Args:
            masks: Bool mask (true: kept) of each, of the parameter's own shape, or the bits of it (of this rank's part
                of it, where the parameter is sharded).
            pull: Strength of the pull on pruned weights at the coming step, for optimizers that have one.
        """
        self.masks, self.pull = dict(masks), pull

    @property
    def switched(self) -> bool:
        """Whether a dense phase that this optimizer decides about is over."""
        return False

    @property
    def plain(self) -> bool:
        """Whether the coming step is AdamW's for masked weights as well."""
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for p in (p for ours in found for p in ours if not self.state[p]):
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": torch.tensor(0.0), **moments}
        self.observe([p for ours in found for p in ours if p in self.masks])
        for group, ours in zip(self.param_groups, found, strict=True):
            masked = [] if self.plain else [p for p in ours if p in self.masks]
            taken = set(map(id, masked))
            self._adamw([p for p in ours if id(p) not in taken], group)
            for together in self._together(masked):
                torch._foreach_mul_(together.weights, 1 - float(group["lr"]) * group["weight_decay"])
                self.update(together, group)
        self.after_update()
        return loss

    def _adamw(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        adamw(
            list(params),
            [p.grad for p in params],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _together(self, params: list[nn.Parameter]) -> Iterator[Together]:
        """Splits masked weights into what one call updates; shards are updated where they are."""
        kinds: dict[Any, Together] = {}
        for p in params:
            state = self.state[p]
            state["step"] += 1
            step = float(state["step"])
            assert p.grad is not None
            tensors = [local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
            bits = local(self.masks[p])
            bits = flat_bits(bits if bits.dtype == torch.uint8 else pack_rows(bits), tensors[0].shape)
            if tensors[0].device.type == "cpu":
                parts = list(pieces(*tensors))
                bytes_each = bits.shape[1] if len(parts) == 1 else _PIECE // 8
                for part, row in zip(parts, bits.split(bytes_each, 1), strict=True):
                    weight, grad, exp_avg, exp_avg_sq = ([t] for t in part)
                    yield Together(weight, grad, exp_avg, exp_avg_sq, [row], [step])
                continue
            kind = kinds.setdefault((p.device, p.dtype), Together([], [], [], [], [], []))
            for into, tensor in zip(kind[:5], (*tensors, bits), strict=True):
                into.append(tensor)
            kind.steps.append(step)
        yield from kinds.values()

    def observe(self, masked: list[nn.Parameter]) -> None:
        """Looks at the masked parameters' gradients and moments before the update."""

    @abstractmethod
    def update(self, together: Together, group: dict[str, Any]) -> None:
        """Updates masked weights in place; weight decay has been applied."""

    def after_update(self) -> None:
        """Called at the end of a step."""


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields flat views of cache size of tensors of one shape, or the tensors themselves where that can't help."""
    if tensors[0].device.type != "cpu" or not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    yield from zip(*(t.view(-1).split(_PIECE) for t in tensors), strict=True)
