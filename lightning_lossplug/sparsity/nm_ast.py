"""AST: STE with an annealed pull on pruned weights that stays out of Adam's momentum.

Source: Huang et al., AAAI 2025, arXiv 2407.20584. The self-distillation from the dense model is a loss term and belongs
to distillation; the boosted variant is :func:`~lightning_lossplug.sparsity.add_slorb`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.bits import factors
from lightning_lossplug.sparsity.masked_adamw import MaskedAdamW, Together
from lightning_lossplug.sparsity.recipes import PhasedRecipe, need

AST_PAPER = "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training"


def annealed_pull(step: int, lambda_w: float = 6e-5, increase_step: int = 10_000) -> float:
    """Returns ``lambda_t = lambda_w min(1, t / increase_step)``."""
    return lambda_w * min(1.0, step / increase_step)


@register("optimizer", "ast_adamw", family="nm_sparsity", paper=AST_PAPER, arxiv="2407.20584", needs="recipe nm_ast")
class ASTAdamW(MaskedAdamW):
    """AdamW in which the pull on pruned weights joins the update but not the first moment, for the recipe ``nm_ast``.

    After decoupled weight decay, with ``g`` the gradient of the loss alone::

        m = beta1 m + (1 - beta1) g
        u = m + lambda_t (1 - mask) W
        v = beta2 v + (1 - beta2) u^2
        W <- W - lr / (1 - beta1^t) * u / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Unmasked parameters get AdamW. As published, the second moment of masked weights is of the update u, so that it
    is of the momentum where nothing pulls; ``variance="gradient"`` takes it of g, which leaves the pull out of both
    moments and with ``lambda_t = 0`` is AdamW bit for bit.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root.
        weight_decay: Decoupled.
        variance: ``update`` (as published) or ``gradient``.

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
        variance: Literal["update", "gradient"] = "update",
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        if variance not in ("update", "gradient"):
            raise LossplugError(
                f"variance is {variance!r}", where="ASTAdamW", remedy="Use 'update' (as published) or 'gradient'"
            )
        self.variance = variance

    def update(self, together: Together, group: dict[str, Any]) -> None:
        """The equations above."""
        weights, grads, exp_avgs, exp_avg_sqs, bits, steps = together
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        updates = exp_avgs
        if self.pull:
            pulls = [factors(row, weight, 0.0, self.pull) for row, weight in zip(bits, weights, strict=True)]
            updates = list(torch._foreach_addcmul(exp_avgs, weights, pulls))
        squared = updates if self.variance == "update" else grads
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, squared, squared, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(weights, updates, denominators, [-(lr / (1 - beta1**step)) for step in steps])


@register("recipe", "nm_ast", family="nm_sparsity", paper=AST_PAPER, arxiv="2407.20584", needs="optimizer ASTAdamW")
@dataclass(frozen=True)
class NMAST(PhasedRecipe):
    """STE with masks refreshed every 10 steps and an annealed pull on pruned weights outside the momentum.

    ``configure_optimizers`` has to return :class:`ASTAdamW`. Meant for a pretrained model; the paper adds
    ``0.33 CE + 0.67 KL`` against the dense model (temperature 2), which is a distillation term beside this recipe.

    Args:
        lambda_w: Final strength of the pull, >= 0 (6e-5; the published script has 1e-4). 0 is AdamW with STE.
        increase_step: Optimizer steps over which it grows from 0, >= 1.
    """

    name = "nm_ast"
    optimizer = "ASTAdamW"
    mask_update_every: int = 10
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0
    lambda_w: float = 6e-5
    increase_step: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.lambda_w >= 0 and math.isfinite(self.lambda_w), f"lambda_w is {self.lambda_w}, allowed is >= 0", self)
        need(self.increase_step >= 1, f"increase_step is {self.increase_step}, allowed is >= 1", self)

    def pull(self, step: int) -> float:
        """The annealed strength."""
        return annealed_pull(step, self.lambda_w, self.increase_step)
