"""Steps that treat the gradient of the distillation and that of the task apart: DOT, gradient alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.registry import register

AlignScope = Literal["all", "shared"]
Parts = Sequence[Tensor | None]


@torch.no_grad()
def align_gradients(kd: Parts, task: Parts, align_scope: AlignScope = "all") -> list[Tensor | None]:
    r"""Returns the distillation gradient without the part that works against the task.

    :math:`g_{kd} - \frac{\min(0, \langle g_{kd}, g_{task}\rangle)}{\|g_{task}\|^2}\,g_{task}`, with the gradients of
    all parameters as one vector (None: zeros). The task's gradient is left alone (arXiv 2411.08937).

    Args:
        kd: Gradient of the distillation for each parameter.
        task: Gradient of the task for the same ones.
        align_scope: ``all``: the norm runs over all parameters, so that where the two are in conflict the parameters
            of the task alone (the main head) get more of its gradient, as in the released code; ``shared``: over those
            that the distillation reaches, and nothing else changes.

    Raises:
        LossplugError: Unknown scope, or lists of different lengths.
    """
    check_choice("align_gradients", "align_scope", align_scope, get_args(AlignScope))
    if len(kd) != len(task):
        raise LossplugError(f"{len(kd)} gradients of the distillation, {len(task)} of the task", where="align")
    pairs = [(a, b) for a, b in zip(kd, task, strict=True) if a is not None and b is not None]
    if not pairs:
        return list(kd)
    product = torch.stack([(a * b).sum() for a, b in pairs]).sum()
    inside = [b for _, b in pairs] if align_scope == "shared" else [b for b in task if b is not None]
    square = torch.stack([b.square().sum() for b in inside]).sum()
    factor = product.clamp(max=0) / square.clamp(min=torch.finfo(square.dtype).tiny)
    result: list[Tensor | None] = []
    for a, b in zip(kd, task, strict=True):
        if b is None or (a is None and align_scope == "shared"):
            result.append(a)
        else:
            result.append((torch.zeros_like(b) if a is None else a) - factor.to(b) * b)
    return result


@register(
    "optimizer",
    "dot",
    family="distillation",
    paper="DOT: A Distillation-Oriented Trainer",
)
class DOT:
    r"""Distillation-oriented steps of an SGD: more momentum for the distillation, less for the task.

    :math:`v_{task} \leftarrow (\mu - \Delta) v_{task} + g_{task} + \lambda\theta`,
    :math:`v_{kd} \leftarrow (\mu + \Delta) v_{kd} + g_{kd}`,
    :math:`\theta \leftarrow \theta - \eta (v_{task} + v_{kd})`; parameters without a distillation gradient have one
    buffer with :math:`\mu`. ``delta`` 0 is the SGD of the summed loss. The optimizer stays the user's: its schedule,
    its checkpoint; :meth:`prepare` hands it the sum as the gradient and lends its momentum and weight decay until
    :meth:`restore`. In the ``Distillation`` callback: ``dot_delta=0.075``.

    Args:
        optimizer: SGD with momentum, without dampening and Nesterov.
        delta: 0.075 on CIFAR-100, 0.09 on ImageNet; at most min(momentum, 1 - momentum), below 1 - momentum.

    Raises:
        LossplugError: Another optimizer, or ``delta`` out of range.
    """

    def __init__(self, optimizer: Optimizer, delta: float = 0.075) -> None:
        if not isinstance(optimizer, SGD):
            raise LossplugError(
                f"needs SGD with momentum, got {type(optimizer).__name__}",
                where="dot",
                remedy="Its two momenta have no meaning elsewhere",
            )
        for group in optimizer.param_groups:
            odd = [k for k in ("dampening", "nesterov", "maximize") if group.get(k)]
            if odd:
                raise LossplugError(f"needs SGD without {odd[0]}", where="dot", remedy=f"Leave {odd[0]} out")
            check_delta(delta, group["momentum"])
        self.optimizer, self.delta = optimizer, delta
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._task: dict[int, Tensor] = {}
        self._kd: dict[int, Tensor] = {}
        self._lent: list[dict[str, Any]] = []

    @torch.no_grad()
    def prepare(self, kd: Parts) -> None:
        """Replaces the gradients (of task and distillation together) by the two velocities, before the step.

        Args:
            kd: The distillation's part of the gradient of each of :attr:`parameters`; None where it has none.
        """
        self.restore()
        i = 0
        for group in self.optimizer.param_groups:
            mu, decay = group["momentum"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.copy_(self._velocity(i, p, kd[i], mu, decay))
                i += 1
            self._lent.append({"momentum": mu, "weight_decay": decay})
            group.update(momentum=0.0, weight_decay=0.0)

    def _velocity(self, i: int, p: nn.Parameter, kd: Tensor | None, mu: float, decay: float) -> Tensor:
        total: Tensor = p.grad  # type: ignore[assignment]
        task = (total if kd is None else total - kd).add(p, alpha=decay)
        if i in self._task:
            task = self._task[i].mul_(mu if kd is None else mu - self.delta).add_(task)
        self._task[i] = task
        if kd is None:
            return self._task[i]
        self._kd[i] = self._kd[i].mul_(mu + self.delta).add_(kd) if i in self._kd else kd.clone()
        return self._task[i] + self._kd[i]

    def restore(self) -> None:
        """Gives momentum and weight decay back, after the step."""
        for group, lent in zip(self.optimizer.param_groups, self._lent, strict=False):
            group.update(lent)
        self._lent = []

    def state_dict(self) -> dict[str, dict[int, Tensor]]:
        """The velocities, by the position of the parameter."""
        return {"task": dict(self._task), "kd": dict(self._kd)}

    def load_state_dict(self, state: dict[str, dict[int, Tensor]]) -> None:
        """Restores :meth:`state_dict`."""
        for mine, saved in ((self._task, state["task"]), (self._kd, state["kd"])):
            mine.clear()
            mine.update({i: v.to(self.parameters[i]).clone() for i, v in saved.items()})


def check_delta(delta: float, momentum: float) -> float:
    """Returns ``delta``, or raises unless both momenta stay in [0, 1).

    Raises:
        LossplugError: It is negative, above the momentum, or not below 1 - momentum.
    """
    check_number("dot", "delta", delta, least=0)
    if delta > momentum or delta >= 1 - momentum - 1e-9:
        raise LossplugError(
            f"delta is {delta}, the optimizer's momentum {momentum}",
            where="dot",
            remedy="It has to be at most the momentum and below 1 - momentum; with 0.9 take 0.075",
        )
    return delta
