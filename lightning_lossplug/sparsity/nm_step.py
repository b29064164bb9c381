"""STEP: dense AdamW until the second moment settles, then N:M training with that moment as a fixed preconditioner.

Source: Lu et al., ICML 2023, arXiv 2302.01172, as the authors of S-STE re-implemented it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.masked_adamw import MaskedAdamW, Together, pieces
from lightning_lossplug.sparsity.recipes import PhasedRecipe
from lightning_lossplug.surgery.shards import full, is_sharded

STEP_PAPER = "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition"


def variance_change(grads: Iterable[Tensor], exp_avg_sqs: Iterable[Tensor], beta2: float, option: int = 1) -> Tensor:
    """Returns ``Z_t``, how far Adam's second moment is about to move, over all weights together (0-dim).

    Option 1 is ``mean_j |v_t - v_{t-1}|_j``, option 2 ``exp(mean_j log |v_t - v_{t-1}|_j)``, with
    ``v_t - v_{t-1} = (1 - beta2) (g^2 - v_{t-1})`` and no bias correction. In option 2 a weight that doesn't move is
    taken as the smallest normal number.

    Args:
        grads: Gradients of step ``t``.
        exp_avg_sqs: ``v_{t-1}``, of the same shapes.
        beta2: Decay of the second moment.
        option: 1 or 2.

    Raises:
        LossplugError: Another option, or no weights.
    """
    if option not in (1, 2):
        raise LossplugError(f"option is {option!r}", where="nm_step", remedy="Use 1 (mean) or 2 (geometric mean)")
    total, count = None, 0
    for grad, v in zip(grads, exp_avg_sqs, strict=True):
        for g, before in [(grad, v)] if is_sharded(v) else pieces(grad, v):
            moved = torch.addcmul(before, g, g, value=-1).mul_(1 - beta2)
            if option == 2:
                part = moved.abs_().clamp_min_(torch.finfo(moved.dtype).tiny).log_().sum()
            else:
                part = torch.linalg.vector_norm(moved, 1, dtype=torch.promote_types(moved.dtype, torch.float32))
            total = full(part) if total is None else total + full(part)
        count += grad.numel()
    if total is None:
        raise LossplugError("no masked weight has a gradient", where="nm_step")
    mean = total / count
    return mean.exp() if option == 2 else mean


@register("optimizer", "step_adamw", family="nm_sparsity", paper=STEP_PAPER, arxiv="2302.01172", needs="recipe nm_step")
class STEPAdamW(MaskedAdamW):
    """AdamW in two phases for the recipe ``nm_step``; unmasked parameters get plain AdamW throughout.

    Phase 1 is AdamW on dense weights. It ends when the mean of the last ``floor(1 / (1 - beta2))`` values of
    :func:`variance_change` is below ``eps`` and more than ``t_min`` steps are done, or after ``t_max`` steps. From then
    on the second moment of masked weights stays as it is, ``v*``, without bias correction::

        W <- W - lr / (1 - beta1^t) * m_t / (sqrt(v*) + eps_star)

    The decision waits for the device once per step of phase 1. The window of values is in the optimizer's state dict.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: As in AdamW, and the threshold of the switch.
        weight_decay: Decoupled, in both phases.
        option: Mean (1) or geometric mean (2) in ``variance_change``.
        total_steps: Length of the run, which gives ``t_min`` and ``t_max`` as a tenth and a half of it.
        t_min: Fewest steps of phase 1.
        t_max: Most steps of phase 1, >= 1.
        eps_star: Added to ``sqrt(v*)`` in phase 2; None: ``eps``. The re-implementation uses ``eps ** 0.75``, which
            keeps the steps of weights with a vanishing ``v*`` smaller.

    Raises:
        LossplugError: A value out of range, or neither ``total_steps`` nor ``t_max``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        option: int = 1,
        total_steps: int | None = None,
        t_min: int | None = None,
        t_max: int | None = None,
        eps_star: float | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        if total_steps is not None:
            t_min = total_steps // 10 if t_min is None else t_min
            t_max = total_steps // 2 if t_max is None else t_max
        if t_max is None:
            raise LossplugError("neither total_steps nor t_max is given", where="STEPAdamW", remedy="Give one of them")
        t_min = min(t_min or 0, t_max)
        if t_max < 1 or t_min < 0:
            raise LossplugError(
                f"t_min is {t_min} and t_max {t_max}: the preconditioner needs at least one step",
                where="STEPAdamW",
                remedy="Choose 0 <= t_min <= t_max and t_max >= 1",
            )
        if option not in (1, 2):
            raise LossplugError(f"option is {option!r}", where="STEPAdamW", remedy="Use 1 or 2")
        self.option, self.t_min, self.t_max = option, t_min, t_max
        self.eps_star = eps if eps_star is None else eps_star
        # In a parameter group, so that torch saves and restores it.
        self.param_groups[0]["phase"] = {"switched": False, "steps": 0, "window": []}

    @property
    def switched(self) -> bool:
        """Whether phase 2 has begun."""
        return bool(self.param_groups[0]["phase"]["switched"])

    def observe(self, masked: list[nn.Parameter]) -> None:
        """Measures the change of the second moment in phase 1."""
        phase = self.param_groups[0]["phase"]
        # At a learning rate of 0, torch takes a step to make room for a sharded state that it is about to load.
        if not self.masks and any(float(group["lr"]) for group in self.param_groups):
            raise LossplugError(
                "no weight is masked, so there is no second moment to watch",
                where="STEPAdamW",
                remedy="Add NMSparsity(recipe='nm_step') to the Trainer, or call take_masks before the step",
            )
        if phase["switched"] or not masked:
            return
        beta2 = self.param_groups[0]["betas"][1]
        grads = [p.grad for p in masked if p.grad is not None]
        z = variance_change(grads, [self.state[p]["exp_avg_sq"] for p in masked], beta2, self.option)
        length = math.floor(1 / (1 - beta2) + 1e-9)
        phase["window"] = [*phase["window"], float(z)][-length:]
        phase["steps"] += 1

    @property
    def plain(self) -> bool:
        """Phase 1."""
        return not self.switched

    def update(self, together: Together, group: dict[str, Any]) -> None:
        """The preconditioned step of phase 2."""
        weights, grads, exp_avgs, exp_avg_sqs, _, steps = together
        lr, beta1 = float(group["lr"]), group["betas"][0]
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(denominators, self.eps_star)
        torch._foreach_addcdiv_(weights, exp_avgs, denominators, [-lr / (1 - beta1**step) for step in steps])

    def after_update(self) -> None:
        """Decides the switch after the update, so that ``v*`` is the second moment of this step."""
        phase = self.param_groups[0]["phase"]
        if phase["switched"] or not phase["steps"]:
            return
        window, beta2 = phase["window"], self.param_groups[0]["betas"][1]
        complete = len(window) == math.floor(1 / (1 - beta2) + 1e-9)
        settled = complete and sum(window) / len(window) < self.param_groups[0]["eps"]
        if (settled and phase["steps"] > self.t_min) or phase["steps"] >= self.t_max:
            phase["switched"], phase["window"] = True, []


@register("recipe", "nm_step", family="nm_sparsity", paper=STEP_PAPER, arxiv="2302.01172", needs="optimizer STEPAdamW")
@dataclass(frozen=True)
class NMStep(PhasedRecipe):
    """Dense until the optimizer's second moment has settled, then ``nm_ste`` with it as a fixed preconditioner.

    ``configure_optimizers`` has to return :class:`STEPAdamW`, which says when the dense phase ends and holds the other
    parameters of the method.

    Args:
        dense_fraction: Fewest steps of the dense phase, as a share of the run; the optimizer decides, so 0.
        finetune_fraction: Without effect on a mask that is hard from the switch on.
    """

    name = "nm_step"
    optimizer = "STEPAdamW"
    optimizer_starts = True
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0
