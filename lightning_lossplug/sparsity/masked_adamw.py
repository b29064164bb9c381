"""AdamW for optimizers that treat masked weights in a way of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lossplug.errors import LossplugError


class MaskedAdamW(Optimizer):
    """AdamW that knows which of its parameters are masked; the others get plain AdamW, bit for bit.

    ``NMSparsity`` tells the masks before every step; a loop of one's own calls :meth:`take_masks`. The update runs one
    parameter at a time, which on an accelerator is slower than torch's fused AdamW.

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
            masks: Bool mask (true: kept) of each, of the parameter's own shape.
            pull: Strength of the pull on pruned weights at the coming step, for optimizers that have one.
        """
        self.masks, self.pull = dict(masks), pull

    @property
    def switched(self) -> bool:
        """Whether a dense phase that this optimizer decides about is over."""
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in found:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        self.observe([p for p, _ in found if p in self.masks])
        for p, group in found:
            state = self.state[p]
            state["step"] += 1
            p.mul_(1 - group["lr"] * group["weight_decay"])
            mask = self.masks.get(p)
            if mask is None:
                self.plain(p, p.grad, state, group)
            else:
                self.update(p, p.grad, mask, state, group)
        self.after_update()
        return loss

    def observe(self, masked: list[nn.Parameter]) -> None:
        """Looks at the masked parameters' gradients and moments before the update."""

    def plain(self, p: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any], **how: Any) -> None:
        """Updates one parameter by :func:`adam_update_`."""
        options = {"lr": float(group["lr"]), "betas": group["betas"], "eps": group["eps"]}
        adam_update_(p, grad, state["exp_avg"], state["exp_avg_sq"], float(state["step"]), **options, **how)

    @abstractmethod
    def update(self, p: nn.Parameter, grad: Tensor, mask: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Updates one masked parameter; weight decay has been applied."""

    def after_update(self) -> None:
        """Called at the end of a step."""


def adam_update_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    pull: Tensor | None = None,
    variance: str = "gradient",
) -> None:
    """Takes an Adam step in place, in the order of torch's AdamW, so that the bits are the same.

    Args:
        weight: The parameter, after weight decay.
        grad: Its gradient.
        exp_avg: First moment, of the gradient alone.
        exp_avg_sq: Second moment.
        step: Steps taken, this one included.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root.
        pull: Added to the first moment where the update uses it, ``u = m + pull``.
        variance: The second moment is of the ``gradient`` or of the ``update`` u.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    update = exp_avg if pull is None else exp_avg + pull
    squared = update if variance == "update" else grad
    exp_avg_sq.mul_(beta2).addcmul_(squared, squared, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    weight.addcdiv_(update, denominator, value=-(lr / (1 - beta1**step)))
