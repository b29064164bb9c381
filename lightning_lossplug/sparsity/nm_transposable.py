"""Recipes with masks that serve W and its transpose: transposable STE, and transposable SR-STE with a dense finish."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.bits import pack_rows
from lightning_lossplug.sparsity.recipes import PhasedRecipe, StepState, need, steps_of
from lightning_lossplug.sparsity.transform import NMTransform
from lightning_lossplug.sparsity.transposable import SOLVERS, Solver, transposable_mask


@register(
    "recipe",
    "nm_transposable",
    family="nm_sparsity",
    paper="Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks",
    arxiv="2102.08124",
)
@dataclass(frozen=True)
class NMTransposable(PhasedRecipe):
    """STE with masks that are N:M along both axes, refreshed every 40 steps; see ``transposable_mask``.

    M has to divide the output axis as well. Convolutions are tiled over output and input channels.

    Args:
        solver: ``exact``, ``greedy`` (faster for large M, keeps slightly less) or ``exhaustive24``.
        dense_fraction: 0 as published; set it to compare recipes at equal settings.
        finetune_fraction: 0 as published; likewise.
    """

    name = "nm_transposable"
    mask_update_every: int = 40
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0
    solver: Solver = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.solver in SOLVERS, f"solver is {self.solver!r}", self, f"Use one of {', '.join(SOLVERS)}")
        fits = self.solver != "exhaustive24" or (self.n, self.m) == (2, 4)
        need(fits, f"exhaustive24 can't search {self.n}:{self.m}", self, "Use solver='exact'")

    def misfit(self, length: int, output_length: int) -> str | None:
        """M divides both axes."""
        reason = super().misfit(length, output_length)
        if reason is None and output_length % self.m:
            reason = f"M = {self.m} does not divide the output axis of {output_length}"
        return reason

    def new_bits(
        self, transform: NMTransform, weight: Tensor, n: int, m: int, scores: Tensor | None, first: bool
    ) -> Tensor:
        """The transposable mask."""
        return pack_rows(transposable_mask(weight, n, m, self.solver, (transform.output_axis, transform.axis), scores))


@register(
    "recipe",
    "nm_tsrste",
    family="nm_sparsity",
    paper="Accelerating Transformer Pre-training with 2:4 Sparsity",
    arxiv="2404.01847",
)
@dataclass(frozen=True)
class NMTSRSTE(NMTransposable):
    """Transposable masks, SR-STE's pull after clipping, and a dense finish: it leaves a dense model.

    The paper takes feed-forward layers only (``include=["*.mlp.*"]``). Its sparse estimate of the output gradient is
    the function :func:`~lightning_lossplug.sparsity.mvue24`; the recipe computes weight gradients exactly.

    Args:
        alpha: Strength of the pull, >= 0: 6e-5 for 124M and 774M parameters, 2e-4 for 350M and 1.5B in the paper.
        dense_finish_fraction: Share of the run at its end that is dense, in [0, 1).
        finetune_fraction: Not for this recipe; the end is dense.
    """

    name = "nm_tsrste"
    alpha: float = 6e-5
    dense_finish_fraction: float = 1 / 6

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.alpha >= 0 and math.isfinite(self.alpha), f"alpha is {self.alpha}, allowed is >= 0", self)
        value = self.dense_finish_fraction
        need(0 <= value < 1, f"dense_finish_fraction is {value}, allowed is [0, 1)", self)
        need(self.finetune_fraction == 0, "finetune_fraction is for recipes that end sparse", self, "Leave it out")
        total = value + self.dense_fraction
        need(total < 1, f"dense_fraction + dense_finish_fraction is {total}", self, "Leave steps to the sparse phase")

    @property
    def ends_dense(self) -> bool:  # type: ignore[override]
        """True unless the dense finish is switched off."""
        return self.dense_finish_fraction > 0

    @property
    def penalty(self) -> float:  # type: ignore[override]
        """Strength of the pull."""
        return self.alpha

    def state(self, step: int, total_steps: int | None) -> StepState:
        """As usual, then dense."""
        if self.ends_dense:
            need(
                total_steps is not None,
                "the training length is unknown",
                self,
                "Set max_steps, max_epochs or total_steps",
            )
            assert total_steps is not None
            if step >= total_steps - steps_of(self.dense_finish_fraction, total_steps):
                return StepState("dense", self.n, self.m, 1.0)
        return super().state(step, total_steps)
