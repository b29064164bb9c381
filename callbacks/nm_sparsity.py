"""Progressive N:M sparsity by a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_lossplug.callbacks.technique import TechniqueCallback
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.sparsity.technique import NMSettings, NMTechnique
from lightning_lossplug.surgery.shards import in_tensor_parallel, is_sharded


class NMSparsity(TechniqueCallback[NMTechnique]):
    """Trains the selected weights to N:M sparsity: at most N of every M consecutive weights along the reduction axis.

    ``None`` stands for the recipe's own default (``lossplug show RECIPE`` prints them); an option that the recipe
    doesn't have is an error.

    Args:
        n: Weights kept in every group.
        m: Group size along the reduction axis; has to divide the axis of every selected layer.
        recipe: ``nm_oneshot``, ``nm_ste``, ``nm_srste``, ``mdgf_linear``, ``mdgf_exponential``, ``sdgf_stepwise``,
            ``sdgf_geometric``, ``nm_sste``, ``nm_cast``, ``nm_transposable``, ``nm_bimask``, ``nm_tsrste`` (ends
            dense) or ``nm_maskllm`` (weights frozen); with an optimizer of their own ``nm_step`` (``STEPAdamW``) and
            ``nm_ast`` (``ASTAdamW``).
        include: Glob patterns of layer paths; None takes every product but embeddings, the output layer, the first
            convolution and depthwise convolutions. A mapping gives every pattern its own pattern:
            ``{"*.mlp.*": "1:16", "*.attn.*": "2:4"}``.
        exclude: Glob patterns that are left out.
        indivisible: ``error`` or ``skip`` for a selected layer whose axis M doesn't divide.
        total_steps: Optimizer steps of the run; None: told by the Trainer.
        score: What orders the weights of a group: ``magnitude``, ``wanda`` (times the norm of each input),
            ``gradient`` (times the norm of each gradient), a function, or its dotted path.
        score_ema: Share that the running mean of those norms keeps at each step, in [0, 1].
        calibration_steps: Dense steps that such a score watches before the first mask, >= 1; ``technique.calibrate``
            watches before the run instead.
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
        solver: ``exact`` or ``greedy``, for transposable masks.
        alpha: Strength of ``nm_tsrste``'s pull on pruned weights, >= 0.
        dense_finish_fraction: Share of the run at its end that ``nm_tsrste`` trains densely.
        increase_step: Steps over which ``nm_ast``'s pull grows.
        rescale: ``fixed`` or ``none``, for ``nm_sste``.
        tau_range: Temperature of ``nm_maskllm`` at the start and the end.
        kappa_range: Factor of its logits at the start and the end.
        prior_strength: Head start that its logits give to the mask by score.
        weight_reg: Its regulariser at the start.
        permute_every: Steps between two searches for an order of outputs in ``nm_bimask``.
        num_candidates: Random orders that each search tries.
        seed: Of what a recipe draws.

    Raises:
        LossplugError: Unknown recipe, a value out of range, or an option the recipe doesn't have.
    """

    told = ("n", "m", "recipe")

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        recipe: str = "nm_srste",
        include: list[str] | dict[str, str] | None = None,
        exclude: list[str] | None = None,
        indivisible: Literal["error", "skip"] = "error",
        total_steps: int | None = None,
        score: str | Callable[..., Any] = "magnitude",
        score_ema: float = 0.99,
        calibration_steps: int = 1,
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
        solver: Literal["exact", "greedy", "exhaustive24"] | None = None,
        alpha: float | None = None,
        dense_finish_fraction: float | None = None,
        increase_step: int | None = None,
        rescale: Literal["fixed", "none"] | None = None,
        tau_range: list[float] | None = None,
        kappa_range: list[float] | None = None,
        prior_strength: float | None = None,
        weight_reg: float | None = None,
        permute_every: int | None = None,
        num_candidates: int | None = None,
        seed: int | None = None,
    ) -> None:
        settings = NMSettings(
            n=n,
            m=m,
            recipe=recipe,
            include=include,
            exclude=exclude or [],
            indivisible=indivisible,
            total_steps=total_steps,
            score=score,
            score_ema=score_ema,
            calibration_steps=calibration_steps,
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
            solver=solver,
            alpha=alpha,
            dense_finish_fraction=dense_finish_fraction,
            increase_step=increase_step,
            rescale=rescale,
            tau_range=tau_range,
            kappa_range=kappa_range,
            prior_strength=prior_strength,
            weight_reg=weight_reg,
            permute_every=permute_every,
            num_candidates=num_candidates,
            seed=seed,
        )
        super().__init__(NMTechnique(settings))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses tensor parallelism, and parameters of a recipe's own that are sharded."""
        super().on_fit_start(trainer, pl_module)
        for name, layer in self.technique.layers.items():
            if in_tensor_parallel(layer.weight):
                raise LossplugError(
                    "tensor parallelism reads the weight past its mask",
                    where=name,
                    remedy="Shard by FSDP2 alone (tensor_parallel_size=1), or exclude the layer",
                )
            if any(is_sharded(p) for p in layer.transform.parameters()):
                recipe = type(layer.recipe).name
                raise LossplugError(f"the logits of {recipe} are sharded", where=name, remedy="Use DDP or one device")
