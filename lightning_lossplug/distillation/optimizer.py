"""The optimizer of what the student's optimizer doesn't hold: online teachers, adapters, second heads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_lossplug.distillation.networks import average_gradients
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number


def like(main: Optimizer, parameters: Iterable[nn.Parameter], lr_scale: float) -> Optimizer:
    """Returns an optimizer of the class and settings of ``main`` for other parameters.

    Matrices get the weight decay of the first group of ``main`` that holds one, vectors (biases, norms) likewise.

    Raises:
        LossplugError: ``main`` can't be made twice that way.
    """
    if isinstance(main, LBFGS):
        raise LossplugError(
            "LBFGS runs the step several times, so nothing can be trained beside it",
            remedy="Use another optimizer, or a method without trainable parts",
        )
    known = inspect.signature(type(main).__init__).parameters
    options = {k: v for k, v in main.defaults.items() if k in known}
    if "lr" in main.param_groups[0]:
        options["lr"] = main.param_groups[0]["lr"] * lr_scale
    decays: dict[bool, float] = {}
    for group in main.param_groups:
        for p in group["params"]:
            decays.setdefault(p.ndim >= 2, group.get("weight_decay", 0.0))
    groups: dict[float, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(decays.get(p.ndim >= 2, options.get("weight_decay", 0.0)), []).append(p)
    if "weight_decay" not in main.defaults:
        made: Any = [p for group in groups.values() for p in group]
    else:
        made = [{"params": ps, "weight_decay": decay} for decay, ps in groups.items()]
    try:
        return type(main)(made, **options)
    except TypeError as error:
        raise LossplugError(
            f"a second {type(main).__name__} can't be made from the settings of the first: {error}",
            remedy="Give optimizer=, a function of the parameters",
        ) from None


class AuxiliaryOptimizer:
    """Steps the extras when, and only when, the student's optimizer steps, after one common backward pass.

    Args:
        parameters: What to train.
        main: The student's optimizer.
        factory: Makes the optimizer; None: one like ``main``, its learning rate following that of ``main``'s
            first group.
        lr_scale: Factor of that learning rate.
        scheduler: Makes a schedule of the optimizer, stepped after each of its steps; the learning rate then follows
            it and not ``main``.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        main: Optimizer,
        factory: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        lr_scale: float = 1.0,
        scheduler: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        check_number("distillation", "lr_scale", lr_scale, above=0)
        self.parameters = [p for p in parameters if p.requires_grad]
        self.main, self.lr_scale = main, lr_scale
        self.optimizer = like(main, self.parameters, lr_scale) if factory is None else factory(self.parameters)
        self.follows = factory is None and scheduler is None
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, scaler: Any = None, clip: Callable[[list[nn.Parameter]], Any] | None = None) -> None:
        """Averages the gradients over processes, unscales, clips and steps.

        The average comes first: a gradient that overflowed on one process then skips the step on all of them.

        Args:
            scaler: A ``GradScaler`` whose ``update`` the caller calls once for all optimizers, or None.
            clip: Called with the parameters that have gradients.
        """
        if self.follows:
            for group in self.optimizer.param_groups:
                if "lr" in group:
                    group["lr"] = self.main.param_groups[0]["lr"] * self.lr_scale
        average_gradients(self.parameters)
        held = [p for p in self.parameters if p.grad is not None]
        if not held:
            return
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if clip is not None:
            clip(held)
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def gradients(self) -> list[torch.Tensor | None]:
        """Returns copies of the gradients, for a checkpoint between two micro-batches."""
        return [None if p.grad is None else p.grad.detach().cpu().clone() for p in self.parameters]

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        """Puts :meth:`gradients` back."""
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = None if g is None else g.to(p)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and schedule, in plain types."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
