"""Progressive N:M sparsity by a callback."""

from __future__ import annotations

from typing import Literal

from lightning_lossplug.callbacks.technique import TechniqueCallback
from lightning_lossplug.sparsity.technique import NMSettings, NMTechnique


class NMSparsity(TechniqueCallback[NMTechnique]):
    """Trains the selected weights to N:M sparsity: at most N of every M consecutive weights along the reduction axis.

    ``None`` stands for the recipe's own default (``lossplug show RECIPE`` prints them); an option that the recipe
    doesn't have is an error.

    Args:
        n: Weights kept in every group.
        m: Group size along the reduction axis; has to divide the axis of every selected layer.
        recipe: ``nm_oneshot``, ``nm_ste``, ``nm_srste``, ``mdgf_linear``, ``mdgf_exponential``, ``sdgf_stepwise`` or
            ``sdgf_geometric``.
        include: Glob patterns of layer paths; None takes every product but embeddings, the output layer, the first
            convolution and depthwise convolutions. A mapping gives every pattern its own pattern:
            ``{"*.mlp.*": "1:16", "*.attn.*": "2:4"}``.
        exclude: Glob patterns that are left out.
        indivisible: ``error`` or ``skip`` for a selected layer whose axis M doesn't divide.
        total_steps: Optimizer steps of the run; None: told by the Trainer.
        mask_update_every: Optimizer steps between two masks.
        dense_fraction: Share of the run that is dense at first, in [0, 1).
        finetune_fraction: Share of the run at the end with the final hard mask, in [0, 1).
        grad_mode: ``ste`` (gradient of the masked weight as it is) or ``masked`` (true derivative), for mask decay.
        lambda_w: Strength of SR-STE's pull on pruned weights, >= 0.
        decoupled: Apply that pull outside the optimizer's moments.
        decay_rate: Mask decay per optimizer step, instead of ``decay_end``.
        decay_end: Fraction of the run at which the mask decay ends.
        decay_floor: Factor that an exponential decay has reached at ``decay_end``.
        k: First group multiplier of ``sdgf_geometric``, a power of two.

    Raises:
        LossplugError: Unknown recipe, a value out of range, or an option the recipe doesn't have.
    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        recipe: str = "nm_srste",
        include: list[str] | dict[str, str] | None = None,
        exclude: list[str] | None = None,
        indivisible: Literal["error", "skip"] = "error",
        total_steps: int | None = None,
        mask_update_every: int | None = None,
        dense_fraction: float | None = None,
        finetune_fraction: float | None = None,
        grad_mode: Literal["ste", "masked"] | None = None,
        lambda_w: float | None = None,
        decoupled: bool | None = None,
        decay_rate: float | None = None,
        decay_end: float | None = None,
        decay_floor: float | None = None,
        k: int | None = None,
    ) -> None:
        settings = NMSettings(
            n=n,
            m=m,
            recipe=recipe,
            include=include,
            exclude=exclude or [],
            indivisible=indivisible,
            total_steps=total_steps,
            mask_update_every=mask_update_every,
            dense_fraction=dense_fraction,
            finetune_fraction=finetune_fraction,
            grad_mode=grad_mode,
            lambda_w=lambda_w,
            decoupled=decoupled,
            decay_rate=decay_rate,
            decay_end=decay_end,
            decay_floor=decay_floor,
            k=k,
        )
        super().__init__(NMTechnique(settings))
