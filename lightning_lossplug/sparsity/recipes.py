"""Recipes of N:M training as pure functions of the optimizer step.

A recipe holds the parameters on its card. ``recipe.plan(total_steps).state(step)`` says what the forward pass of a step
uses: the phase, the pattern N:M and the factor D of the pruned weights. Step 0 is the first; fractions of a run are
rounded down to whole steps. Steps are optimizer steps, so accumulation and batch size don't change the meaning.

Sources: arXiv 2104.08378 (one-shot), 2102.04010 (STE, SR-STE), 2402.04744 (mask decay, structure decay).
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.nm_mask import nm_mask
from lightning_lossplug.sparsity.ste import GradMode
from lightning_lossplug.sparsity.transform import NMTransform

Phase = Literal["dense", "sparse", "finetune"]

PGF = "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers"


class StepState(NamedTuple):
    """What the forward pass of one step uses.

    Args:
        phase: ``dense`` (all weights), ``sparse`` or ``finetune`` (the final hard mask).
        n: Weights kept per group.
        m: Group size.
        decay: Factor of the pruned weights, 1 (dense) to 0 (hard mask).
    """

    phase: Phase
    n: int
    m: int
    decay: float


def need(ok: bool, what: str, recipe: Recipe, remedy: str | None = None) -> None:
    """Raises :class:`LossplugError` unless ``ok``."""
    if not ok:
        raise LossplugError(what, where=type(recipe).name, remedy=remedy)


def steps_of(fraction: float, total: int) -> int:
    """Returns ``floor(fraction * total)``, forgiving the last bit of a product like ``0.29 * 100``."""
    return math.floor(fraction * total + 1e-9)


@dataclass(frozen=True)
class Recipe(ABC):
    """Common part of all recipes.

    Args:
        n: Weights kept in every group, 1 <= n <= m (n = m changes nothing and warns).
        m: Group size along the reduction axis.
        mask_update_every: Optimizer steps between two masks, >= 1.
    """

    name: ClassVar[str]
    frozen_mask: ClassVar[bool] = False  # the first mask stays; pruned weights, gradients and moments are zero
    penalty: ClassVar[float] = 0.0  # strength of the pull on pruned weights
    penalty_decoupled: ClassVar[bool] = False
    optimizer: ClassVar[str | None] = None  # name of the optimizer that has a part of the recipe
    optimizer_starts: ClassVar[bool] = False  # it says when the dense phase is over
    takes_scores: ClassVar[bool] = True
    shrinks: ClassVar[bool] = False  # it changes pruned weights after the optimizer's step
    ends_dense: ClassVar[bool] = False  # the recipe speeds training up and leaves a dense model

    n: int = 2
    m: int = 4
    mask_update_every: int = 1

    def __post_init__(self) -> None:
        need(type(self.n) is int and type(self.m) is int, f"n and m are {self.n!r} and {self.m!r}", self)
        need(1 <= self.n <= self.m, f"N:M is {self.n}:{self.m}", self, "Choose 1 <= N < M, for example 2:4")
        every = self.mask_update_every
        need(type(every) is int and every >= 1, f"mask_update_every is {every!r}", self, "Choose 1, 2, 3 …")
        if self.n == self.m:
            warnings.warn(f"{type(self).name}: {self.n}:{self.m} keeps every weight, so it changes nothing")

    @abstractmethod
    def state(self, step: int, total_steps: int | None) -> StepState:
        """Returns what the forward pass of ``step`` uses in a run of ``total_steps``.

        Raises:
            LossplugError: The recipe needs ``total_steps`` and it is None.
        """

    def plan(self, total_steps: int | None) -> Plan:
        """Returns the recipe bound to the length of a run."""
        return Plan(self, total_steps)

    def mask_due(self, step: int, last_update: int) -> bool:
        """Tells whether a step needs a new mask, when the last one was made at ``last_update`` (-1: never)."""
        if last_update < 0:
            return True
        return not self.frozen_mask and step - last_update >= self.mask_update_every

    def fit_axis(self, length: int) -> Self:
        """Returns the recipe as it can be run on a reduction axis of this length."""
        return self

    def misfit(self, length: int, output_length: int) -> str | None:
        """Returns why the recipe can't take a weight with these reduction and output axes, or None."""
        if length % self.m:
            return f"M = {self.m} does not divide the reduction axis of {length}"
        return None

    def refuses(self, layer: nn.Module, parameter: str) -> str | None:
        """Returns why the recipe can't work on a parameter of a layer, or None."""
        return None

    def build_transform(self, weight: Tensor, axis: int, output_axis: int) -> NMTransform:
        """Returns what stands in the weight's stack."""
        return NMTransform(weight, axis=axis, output_axis=output_axis)

    def new_bits(
        self, transform: NMTransform, weight: Tensor, n: int, m: int, scores: Tensor | None, first: bool
    ) -> Tensor:
        """Returns the bits of a step's mask (:func:`~lightning_lossplug.sparsity.pack_rows`).

        Args:
            transform: What :meth:`build_transform` built.
            weight: The whole dense weight.
            n: Weights kept per group at this step.
            m: Group size at this step.
            scores: Replaces the magnitude, or None.
            first: Whether it is the first mask of the run.
        """
        return nm_mask(weight, n, m, dim=transform.axis, scores=scores, packed=True)

    def tune(self, transform: NMTransform, step: int, total_steps: int | None) -> None:  # noqa: B027
        """Sets what else the transform needs for a step."""

    def shrink(self, weight: Tensor, bits: Tensor, step: int, total_steps: int | None) -> None:  # noqa: B027
        """Changes pruned weights after the optimizer's step ``step``.

        Args:
            weight: This rank's part of the dense weight.
            bits: Of the mask of that part.
            step: The step that the optimizer has taken.
            total_steps: Length of the run.
        """

    def penalise(  # noqa: B027
        self, transform: NMTransform, weight: Tensor, step: int, total_steps: int | None, grad_scale: float
    ) -> None:
        """Adds the gradient of what the transform's own parameters are penalised by, times ``grad_scale``."""

    def pull(self, step: int) -> float:
        """Returns the strength of the pull on pruned weights at a step."""
        return self.penalty


@dataclass(frozen=True)
class Plan:
    """A recipe and the number of optimizer steps of the run."""

    recipe: Recipe
    total_steps: int | None

    def state(self, step: int) -> StepState:
        """Returns what the forward pass of ``step`` uses."""
        return self.recipe.state(step, self.total_steps)


@dataclass(frozen=True)
class PhasedRecipe(Recipe):
    """A recipe with a dense phase before and a fine-tune phase after the sparse one.

    Args:
        dense_fraction: Share of the run before sparsification, in [0, 1).
        finetune_fraction: Share of the run at its end with the final hard mask, in [0, 1).
    """

    dense_fraction: float = 0.05
    finetune_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dense_fraction", "finetune_fraction"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            need(number and 0 <= value < 1, f"{name} is {value!r}, allowed is [0, 1)", self)
        total = self.dense_fraction + self.finetune_fraction
        need(total < 1, f"dense_fraction + finetune_fraction is {total}", self, "Leave steps to the sparse phase")

    def boundaries(self, total_steps: int | None) -> tuple[int, float]:
        """Returns the first sparse step and the first fine-tune step (infinite when there is none)."""
        if total_steps is None:
            need(
                self.dense_fraction == 0 and self.finetune_fraction == 0,
                "the training length is unknown, so there are no fractions of it",
                self,
                "Set max_steps or max_epochs, or total_steps",
            )
            return 0, math.inf
        return steps_of(self.dense_fraction, total_steps), total_steps - steps_of(self.finetune_fraction, total_steps)

    def state(self, step: int, total_steps: int | None) -> StepState:
        """Dense, sparse or fine-tune."""
        dense_end, finetune_start = self.boundaries(total_steps)
        if step < dense_end:
            return StepState("dense", self.n, self.m, 1.0)
        if step >= finetune_start or (total_steps is not None and step >= total_steps):
            return StepState("finetune", self.n, self.m, 0.0)
        return self.sparse(step - dense_end, dense_end, total_steps)

    def sparse(self, j: int, dense_end: int, total_steps: int | None) -> StepState:
        """Returns the state of sparse step ``j``; a hard mask unless a recipe says otherwise."""
        return StepState("sparse", self.n, self.m, 0.0)


@register(
    "recipe",
    "nm_oneshot",
    family="nm_sparsity",
    paper="Accelerating Sparse Deep Neural Networks",
    arxiv="2104.08378",
    aliases=("asp",),
)
@dataclass(frozen=True)
class NMOneShot(PhasedRecipe):
    """Prune once by magnitude, then train with the mask frozen.

    Gradients, weights and optimizer moments of pruned entries are zero from then on.

    Args:
        dense_fraction: Share of the run before pruning; 0 for a pretrained model.
        finetune_fraction: Without effect on a frozen mask, kept so that recipes can be run with equal settings.
    """

    name = "nm_oneshot"
    frozen_mask = True
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0


@register(
    "recipe",
    "nm_ste",
    family="nm_sparsity",
    paper="Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (ablation)",
    arxiv="2102.04010",
)
@dataclass(frozen=True)
class NMSTE(PhasedRecipe):
    """A new mask every step; the dense weight receives the masked weight's gradient.

    The card has no dense phase, so ``dense_fraction`` is 0; set it to compare recipes at equal settings.
    """

    name = "nm_ste"
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0


@register(
    "recipe",
    "nm_srste",
    family="nm_sparsity",
    paper="Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
    arxiv="2102.04010",
    aliases=("sr_ste",),
)
@dataclass(frozen=True)
class NMSRSTE(PhasedRecipe):
    """STE and a pull of the currently pruned weights to zero: ``grad = g + lambda_w (1 - mask) W``.

    The term is added once per optimizer step, after unscaling and clipping. With Adam it passes through the moments;
    ``decoupled`` keeps it out of them: ``W <- W (1 - lr lambda_w (1 - mask))``.

    Args:
        lambda_w: Strength, >= 0; 0 is ``nm_ste``.
        decoupled: Apply the pull outside the optimizer's moments.
        dense_fraction: 0 as published; set it to compare recipes at equal settings.
        finetune_fraction: 0 as published; likewise.
    """

    name = "nm_srste"
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0
    lambda_w: float = 2e-4
    decoupled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.lambda_w >= 0 and math.isfinite(self.lambda_w), f"lambda_w is {self.lambda_w}, allowed is >= 0", self)

    @property
    def penalty(self) -> float:  # type: ignore[override]
        """Strength of the pull."""
        return self.lambda_w

    @property
    def penalty_decoupled(self) -> bool:  # type: ignore[override]
        """Whether the pull stays out of the optimizer's moments."""
        return self.decoupled


@dataclass(frozen=True)
class MdGf(PhasedRecipe):
    """Mask decay: pruned weights stay in the forward pass, times a factor D that falls from 1.

    Args:
        decay_rate: Decay per optimizer step, > 0; None: from ``decay_end``.
        decay_end: Fraction of the run at which D has fallen; after ``dense_fraction``.
        grad_mode: ``ste``: the dense weight receives the gradient as it is; ``masked``: times ``mask + D (1 - mask)``.
    """

    decay_rate: float | None = None
    decay_end: float = 0.7
    grad_mode: GradMode = "ste"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.grad_mode in ("ste", "masked"), f"grad_mode is {self.grad_mode!r}", self, "Use 'ste' or 'masked'")
        if self.decay_rate is not None:
            need(self.decay_rate > 0, f"decay_rate is {self.decay_rate}, allowed is > 0", self)
        else:
            inside = self.dense_fraction < self.decay_end <= 1
            need(inside, f"decay_end is {self.decay_end}", self, "Choose it after dense_fraction and at most 1")

    def build_transform(self, weight: Tensor, axis: int, output_axis: int) -> NMTransform:
        """The transform with the gradient of choice."""
        return NMTransform(weight, self.grad_mode, axis, output_axis)

    def length(self, dense_end: int, total_steps: int | None) -> float:
        """Returns the sparse steps until the decay ends, for a decay given by ``decay_end``."""
        if total_steps is None:
            need(False, "the training length is unknown", self, "Set max_steps or max_epochs, or give decay_rate")
        return max(self.decay_end * (total_steps or 0) - dense_end, 1.0)

    @abstractmethod
    def factor(self, j: int, dense_end: int, total_steps: int | None) -> float:
        """Returns D at sparse step ``j``."""

    def sparse(self, j: int, dense_end: int, total_steps: int | None) -> StepState:
        """The target pattern from the first sparse step, pruned weights times D."""
        return StepState("sparse", self.n, self.m, self.factor(j, dense_end, total_steps))


@register("recipe", "mdgf_linear", family="nm_sparsity", paper=PGF, arxiv="2402.04744")
@dataclass(frozen=True)
class MdGfLinear(MdGf):
    """``D(j) = max(1 - beta j, 0)``, with beta the ``decay_rate`` or ``1 / (decay_end T - T_d)``."""

    name = "mdgf_linear"

    def factor(self, j: int, dense_end: int, total_steps: int | None) -> float:
        """``max(1 - beta j, 0)``."""
        beta = self.decay_rate or 1 / self.length(dense_end, total_steps)
        return max(1 - beta * j, 0.0) if j < math.ceil(1 / beta) else 0.0


@register("recipe", "mdgf_exponential", family="nm_sparsity", paper=PGF, arxiv="2402.04744")
@dataclass(frozen=True)
class MdGfExponential(MdGf):
    """``D(j) = exp(-beta j)``; the fine-tune phase ends with the hard mask, since D itself never reaches 0.

    Args:
        decay_floor: D at ``decay_end``, in (0, 1): ``beta = ln(1 / decay_floor) / (decay_end T - T_d)``.
    """

    name = "mdgf_exponential"
    decay_floor: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        need(0 < self.decay_floor < 1, f"decay_floor is {self.decay_floor}, allowed is (0, 1)", self)

    def factor(self, j: int, dense_end: int, total_steps: int | None) -> float:
        """``exp(-beta j)``."""
        beta = self.decay_rate or math.log(1 / self.decay_floor) / self.length(dense_end, total_steps)
        return math.exp(-beta * j)


@dataclass(frozen=True)
class SdGf(PhasedRecipe):
    """Structure decay: always a hard mask, whose pattern tightens in equal intervals."""

    @abstractmethod
    def patterns(self) -> list[tuple[int, int]]:
        """Returns the patterns in order; the last one is N:M."""

    def schedule(self, total_steps: int) -> dict[int, tuple[int, int]]:
        """Returns ``{first step: (n, m)}`` of every interval."""
        dense_end, finetune_start = self.boundaries(total_steps)
        steps, patterns = int(finetune_start) - dense_end, self.patterns()
        return {dense_end + d * steps // len(patterns): pattern for d, pattern in enumerate(patterns)}

    def sparse(self, j: int, dense_end: int, total_steps: int | None) -> StepState:
        """The pattern of the interval."""
        if total_steps is None:
            need(False, "the training length is unknown", self, "Set max_steps or max_epochs, or total_steps")
        schedule = self.schedule(total_steps or 0)
        n, m = schedule[max(first for first in schedule if first <= dense_end + j)]
        return StepState("sparse", n, m, 0.0)


@register("recipe", "sdgf_stepwise", family="nm_sparsity", paper=PGF, arxiv="2402.04744")
@dataclass(frozen=True)
class SdGfStepwise(SdGf):
    """(M-1):M, then M/2:M, M/4:M … N:M; M / N has to be a power of two."""

    name = "sdgf_stepwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.m // self.n
        ok = self.m % self.n == 0 and ratio & (ratio - 1) == 0
        need(ok, f"M / N is {self.m}/{self.n}, not a power of two", self, "Choose 1:4, 2:4, 1:8, 2:8, 1:16 …")

    def patterns(self) -> list[tuple[int, int]]:
        """``log2(M / N) + 1`` patterns."""
        halvings = (self.m // self.n).bit_length() - 1
        return [(self.m - 1, self.m) if d == 0 and halvings else (self.m >> d, self.m) for d in range(halvings + 1)]


@register("recipe", "sdgf_geometric", family="nm_sparsity", paper=PGF, arxiv="2402.04744")
@dataclass(frozen=True)
class SdGfGeometric(SdGf):
    """kN:kM, (k/2)N:(k/2)M … N:M: the share of kept weights is constant, the freedom shrinks.

    Args:
        k: First multiplier, a power of two; a layer whose axis k M does not divide takes the largest smaller one.
    """

    name = "sdgf_geometric"
    k: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.k >= 1 and self.k & (self.k - 1) == 0, f"k is {self.k}, not a power of two", self, "Choose 1, 2, 4 …")

    def patterns(self) -> list[tuple[int, int]]:
        """``log2(k) + 1`` patterns."""
        return [(self.n * (self.k >> d), self.m * (self.k >> d)) for d in range(self.k.bit_length())]

    def fit_axis(self, length: int) -> Self:
        """The largest k such that k M divides the axis."""
        k = self.k
        while k > 1 and length % (k * self.m):
            k //= 2
        return self if k == self.k else replace(self, k=k)
