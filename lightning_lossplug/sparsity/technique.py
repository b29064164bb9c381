"""Progressive N:M sparsity as a technique: which weights, which recipe, and its place in the optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import registry
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity.bits import changed, mask_, shard_bits
from lightning_lossplug.sparsity.calibration import calibrate
from lightning_lossplug.sparsity.masked_adamw import MaskedAdamW
from lightning_lossplug.sparsity.recipes import Recipe, StepState
from lightning_lossplug.sparsity.scores import Score, find_score, score_path, score_signals
from lightning_lossplug.sparsity.signals import merge_inputs
from lightning_lossplug.sparsity.srste import srste_decay_, srste_penalty_
from lightning_lossplug.sparsity.transform import NMTransform
from lightning_lossplug.surgery.plug import latent, plain_class, plug, transform_of, unplug
from lightning_lossplug.surgery.select import Candidate, Selection, matches, require_list, select
from lightning_lossplug.surgery.shards import full, local
from lightning_lossplug.technique import Technique

# Settings of the technique; the others are options of the recipe.
COMMON_FIELDS = frozenset({"n", "m", "recipe", "include", "exclude", "indivisible", "total_steps"}) | frozenset(
    {"score", "score_ema", "calibration_steps"}
)


@dataclass(frozen=True)
class NMSettings:
    """Settings of :class:`NMTechnique`; ``None`` means the recipe's own default (``lossplug show RECIPE``).

    Args:
        n: Weights kept in every group.
        m: Group size along the reduction axis.
        recipe: Registry name of the recipe.
        include: Glob patterns of layer paths; None: every product but the default exclusions. A mapping gives every
            pattern its own ``N:M``, for example ``{"*.mlp.*": "1:16", "*.attn.*": "2:4"}``; the first match counts.
        exclude: Glob patterns that are left out.
        indivisible: What to do with a selected layer whose reduction axis ``m`` does not divide: ``error`` or ``skip``.
        total_steps: Length of the run in optimizer steps; None: told by the Trainer.
        score: What orders the weights of a group: ``magnitude``, ``wanda``, ``gradient``, or the dotted path of a
            function (see :mod:`~lightning_lossplug.sparsity.scores`).
        score_ema: Share that the running mean of a score's signals keeps at each step, in [0, 1]; at 1 all steps count
            alike. The first steps are always averaged evenly.
        calibration_steps: Optimizer steps, dense, that a score which needs signals watches before the first mask.
        mask_update_every: Optimizer steps between two masks.
        dense_fraction: Share of the run that is dense at first.
        finetune_fraction: Share of the run at the end with the final hard mask.
        grad_mode: ``ste`` or ``masked``.
        lambda_w: SR-STE's pull on pruned weights.
        decoupled: Apply that pull outside the optimizer's moments.
        decay_rate: Mask decay per step.
        decay_end: Fraction of the run at which the mask decay ends.
        decay_floor: Factor an exponential decay has reached at ``decay_end``.
        k: First group multiplier of the geometric structure decay.
        solver: Of transposable masks.
        alpha: Pull on pruned weights of ``nm_tsrste``.
        dense_finish_fraction: Share of the run at the end that is dense, for ``nm_tsrste``.
        increase_step: Steps over which the pull of ``nm_ast`` grows.
        rescale: Scale of ``nm_sste``.
        tau_range: Temperatures of ``nm_maskllm``.
        kappa_range: Factors of the logits of ``nm_maskllm``.
        prior_strength: Head start of the first mask in ``nm_maskllm``.
        weight_reg: Regulariser of ``nm_maskllm``.
        permute_every: Steps between two searches of ``nm_bimask``.
        num_candidates: Orders that it tries.
        seed: Of what a recipe draws.
    """

    n: int = 2
    m: int = 4
    recipe: str = "nm_srste"
    include: list[str] | dict[str, str] | None = None
    exclude: list[str] = dataclasses.field(default_factory=list)
    indivisible: str = "error"
    total_steps: int | None = None
    score: str | Score = "magnitude"
    score_ema: float = 0.99
    calibration_steps: int = 1
    mask_update_every: int | None = None
    dense_fraction: float | None = None
    finetune_fraction: float | None = None
    grad_mode: str | None = None
    lambda_w: float | None = None
    decoupled: bool | None = None
    decay_rate: float | None = None
    decay_end: float | None = None
    decay_floor: float | None = None
    k: int | None = None
    solver: str | None = None
    alpha: float | None = None
    dense_finish_fraction: float | None = None
    increase_step: int | None = None
    rescale: str | None = None
    tau_range: list[float] | None = None
    kappa_range: list[float] | None = None
    prior_strength: float | None = None
    weight_reg: float | None = None
    permute_every: int | None = None
    num_candidates: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", score_path(self.score))  # plain text, for YAML and checkpoints
        find_score(self.score)
        if not 0 <= self.score_ema <= 1:
            raise LossplugError(f"score_ema is {self.score_ema}, allowed is [0, 1]", where="NMSparsity")
        if self.calibration_steps < 1:
            raise LossplugError(f"calibration_steps is {self.calibration_steps}, allowed is >= 1", where="NMSparsity")
        if self.indivisible not in ("error", "skip"):
            raise LossplugError(
                f"indivisible is {self.indivisible!r}", where="NMSparsity", remedy="Use 'error' or 'skip'"
            )
        if self.total_steps is not None and self.total_steps < 1:
            raise LossplugError(f"total_steps is {self.total_steps}, allowed is >= 1", where="NMSparsity")
        require_list(self.include, "include", "NMSparsity")
        require_list(self.exclude, "exclude", "NMSparsity")
        for n, m in self.patterns().values() or [(self.n, self.m)]:
            if n == m:  # a recipe may stand still at N = M; asking for it by name is a slip
                raise LossplugError(
                    f"{n}:{m} keeps every weight", where="NMSparsity", remedy="Choose N < M, for example 2:4"
                )
            recipe = self.build_recipe(n, m)  # a wrong value is an error now, not when the Trainer starts
            if self.score != "magnitude" and not recipe.takes_scores:
                raise LossplugError(
                    f"{self.recipe} orders weights by magnitude, not by {self.score!r}",
                    where="NMSparsity",
                    remedy="Leave score out, or choose another recipe",
                )

    def patterns(self) -> dict[str, tuple[int, int]]:
        """Returns ``{glob: (n, m)}``; a plain list of globs shares ``n`` and ``m``."""
        if isinstance(self.include, dict):
            return {glob: parse_nm(pattern) for glob, pattern in self.include.items()}
        return dict.fromkeys(["*"] if self.include is None else self.include, (self.n, self.m))

    def build_recipe(self, n: int, m: int) -> Recipe:
        """Builds the recipe for one pattern from the options that were given."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in options.items() if name not in COMMON_FIELDS and value is not None}
        return registry.create("recipe", self.recipe, n=n, m=m, **given)


def parse_nm(pattern: str) -> tuple[int, int]:
    """Parses ``"2:4"``.

    Raises:
        LossplugError: Not two numbers with a colon.
    """
    n, colon, m = str(pattern).partition(":")
    if not (colon and n.strip().isdigit() and m.strip().isdigit()):
        raise LossplugError(
            f"{pattern!r} is no N:M pattern", where="NMSparsity", remedy="Write it like '2:4', in quotes in YAML"
        )
    return int(n), int(m)


@dataclass
class _Layer:
    candidate: Candidate
    recipe: Recipe
    last_update: int = -1
    pattern: tuple[int, int] | None = None
    flip_rate: float | None = None

    @property
    def weight(self) -> nn.Parameter:
        return latent(self.candidate.layer, self.candidate.parameter)

    @property
    def transform(self) -> NMTransform:
        found = transform_of(self.candidate.layer, "sparsity", self.candidate.parameter)
        assert isinstance(found, NMTransform)
        return found


def hides_input(candidate: Candidate) -> str | None:
    """Returns why a hook doesn't see the input of a weight's product, or None."""
    if candidate.parameter != "weight":
        return "which is computed inside the layer"
    if plain_class(candidate.layer).__name__ == "NonDynamicallyQuantizableLinear":
        return "and nn.MultiheadAttention reads its weight without calling it"
    return None


class NMTechnique(Technique[NMSettings]):
    """N:M sparsity along the reduction axis of each selected weight, by one of the registered recipes.

    Order within a step: unscale, clip, penalty (:meth:`before_step`), optimizer, tick and mask (:meth:`advance`).
    """

    name = "NMSparsity"

    def __init__(self, settings: NMSettings) -> None:
        super().__init__(settings)
        self.layers: dict[str, _Layer] = {}
        self.measure = True  # whether to compare each new mask with the last one
        self.score = find_score(settings.score)
        self.signals = score_signals(self.score)
        self._calibrated = False  # signals were gathered before the run, so its start must not forget them
        self._started = False  # the optimizer of the recipe has ended the dense phase
        self._progress = Progress(0)
        self._position: tuple[str, float] | None = None

    def attach(self, model: nn.Module) -> Selection:
        """Plugs the selected weights; see :meth:`Technique.attach`."""
        patterns = self.settings.patterns()

        def recipe_for(candidate: Candidate) -> Recipe:
            for glob, (n, m) in patterns.items():
                if matches([glob], candidate) is not None:
                    recipe = self.settings.build_recipe(n, m)
                    length = candidate.shape[candidate.reduction_axis or 0]
                    return recipe.fit_axis(length)
            raise AssertionError(candidate.name)

        def check(candidate: Candidate) -> str | None:
            if candidate.reduction_axis is None:
                return "an embedding has no reduction axis"
            weight = latent(candidate.layer, candidate.parameter)
            if not weight.is_floating_point():
                return f"its dtype is {weight.dtype}"
            if "input_norm" in self.signals and (reason := hides_input(candidate)):
                return f"the score {self.settings.score} needs its input, {reason}"
            recipe = recipe_for(candidate)
            refusal = recipe.refuses(candidate.layer, candidate.parameter)
            if refusal is not None:
                return f"{self.settings.recipe} doesn't take it: {refusal}"
            length = candidate.shape[candidate.reduction_axis]
            reason = recipe.misfit(length, candidate.shape[candidate.output_axis])
            if reason is None:
                return None
            if getattr(candidate.layer, "groups", 1) > 1:
                return f"grouped convolution with {length} input channels per group: {reason}"
            if self.settings.indivisible == "skip":
                return reason
            raise LossplugError(
                f"{reason} (weight {candidate.shape})",
                where=candidate.name,
                remedy="Choose another M, add the layer to exclude, or set indivisible='skip'",
            )

        include = None if self.settings.include is None else list(patterns)
        selection = select(model, include, self.settings.exclude, check=check, technique=self.name)
        for candidate in selection.taken:
            known = self.layers.get(candidate.name)
            if known is not None and known.candidate.layer is candidate.layer:
                continue
            recipe = recipe_for(candidate)
            weight, axis = latent(candidate.layer, candidate.parameter), candidate.reduction_axis
            assert axis is not None
            transform = recipe.build_transform(weight, axis, candidate.output_axis)
            if self.signals:
                transform.watch(self.signals, candidate.layer, weight, axis)
            plug(candidate.layer, transform, parameter=candidate.parameter, where=candidate.name)
            self.layers[candidate.name] = _Layer(candidate, recipe)
        return selection

    def calibrate(
        self, model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
    ) -> None:
        """Gathers a score's signals from data before the run, so that the first step can be masked.

        Args:
            model: The attached model, or a part of it that the batches go through.
            batches: Calibration data; each batch counts as one step.
            forward: Runs the model on a batch; see :func:`~lightning_lossplug.sparsity.calibration.calibrate`.

        Raises:
            LossplugError: The score needs no data, or nothing was seen.
        """
        if not self.signals:
            raise LossplugError(
                f"the score {self.settings.score!r} needs no data", where=self.name, remedy="Use score='wanda'"
            )
        weights = {layer.weight: layer.transform for layer in self.layers.values()}
        calibrate(model, weights, batches, forward, self.name)
        self._calibrated = True

    @torch.no_grad()
    def advance(self, progress: Progress) -> None:
        """Sets decay and mask of every layer for the step to come."""
        self._progress = progress
        total = self.settings.total_steps or progress.total_steps
        for name, layer in self.layers.items():
            state = layer.recipe.plan(total).state(progress.step)
            transform = layer.transform
            if state.phase != "dense" and layer.pattern is None and not self._may_start(layer):
                state = StepState("dense", state.n, state.m, 1.0)
            self._position = (state.phase, state.decay)
            transform.set_decay(state.decay)
            layer.recipe.tune(transform, progress.step, total)
            gathering = bool(self.signals) and not (layer.recipe.frozen_mask and layer.pattern is not None)
            if gathering != transform.gathering:  # a module's attributes are slow to set
                transform.gathering = gathering
            if state.phase == "dense":
                continue
            pattern = (state.n, state.m)
            if layer.pattern == pattern and not layer.recipe.mask_due(progress.step, layer.last_update):
                continue
            self._new_mask(name, layer, pattern)
            layer.pattern, layer.last_update = pattern, progress.step

    def _may_start(self, layer: _Layer) -> bool:
        """Whether the first mask can be made: the score has seen enough, and the optimizer is ready."""
        if layer.recipe.optimizer_starts and not self._started:
            return False
        if not self.signals:
            return True
        seen = layer.transform.steps_seen()
        return seen >= self.settings.calibration_steps or (self._calibrated and seen > 0)

    def _new_mask(self, name: str, layer: _Layer, pattern: tuple[int, int]) -> None:
        transform, weight = layer.transform, full(layer.weight)
        try:
            scores = self.score(weight, **transform.signals(weight)) if self.settings.score != "magnitude" else None
            bits = layer.recipe.new_bits(transform, weight, *pattern, scores, first=layer.pattern is None)
        except LossplugError as error:
            raise LossplugError(error.what, where=name, remedy=error.remedy) from None
        if self.measure and layer.pattern is not None:
            layer.flip_rate = changed(transform.bits, bits) / weight.numel()
        transform.set_bits(bits)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, grad_scale: float = 1.0) -> None:
        """Adds the pull on pruned weights, masks the gradients of a frozen mask, tells the optimizer the masks."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._tell_masks(optimizer, groups)
        for layer in self.layers.values():
            group, transform = groups.get(id(layer.weight)), layer.transform
            if any(id(p) in groups for p in transform.parameters()):
                total = self.settings.total_steps or self._progress.total_steps
                layer.recipe.penalise(transform, full(layer.weight), self._progress.step, total, grad_scale)
            if group is None or layer.weight.grad is None:
                continue
            if transform.gathering and "grad_norm" in self.signals:
                transform.see_gradient(full(layer.weight.grad) / grad_scale, self.settings.score_ema)
            if transform.mode == "dense":
                continue
            weight, grad = local(layer.weight), local(layer.weight.grad)
            if layer.recipe.frozen_mask:
                mask_(grad, shard_bits(transform.bits, layer.weight))
            elif layer.recipe.penalty > 0:
                mask = shard_bits(transform.bits, layer.weight)
                if layer.recipe.penalty_decoupled:
                    srste_decay_(weight, mask, layer.recipe.penalty, float(group["lr"]))
                else:
                    srste_penalty_(grad, weight, mask, layer.recipe.penalty * grad_scale)

    def _tell_masks(self, optimizer: Optimizer, groups: dict[int, Any]) -> None:
        ours = [layer for layer in self.layers.values() if id(layer.weight) in groups]
        wanted = next((layer.recipe.optimizer for layer in ours if layer.recipe.optimizer), None)
        if wanted is None:
            return
        if not isinstance(optimizer, MaskedAdamW) or wanted not in (base.__name__ for base in type(optimizer).__mro__):
            raise LossplugError(
                f"{self.settings.recipe} needs the optimizer {wanted}, the weights are in {type(optimizer).__name__}",
                where=self.name,
                remedy=f"Return lightning_lossplug.sparsity.{wanted} from configure_optimizers",
            )
        masks = {layer.weight: shard_bits(layer.transform.bits, layer.weight) for layer in ours}
        optimizer.take_masks(masks, ours[0].recipe.pull(self._progress.step))

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Shrinks pruned weights, keeps what a frozen mask prunes at zero; gathers what the layers saw."""
        if isinstance(optimizer, MaskedAdamW):
            self._started = self._started or optimizer.switched
        merge_inputs([t for layer in self.layers.values() if (t := layer.transform).gathering], self.settings.score_ema)
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        total = self.settings.total_steps or self._progress.total_steps
        for layer in self.layers.values():
            if layer.recipe.shrinks and layer.pattern is not None and id(layer.weight) in ours:
                bits = shard_bits(layer.transform.bits, layer.weight)
                layer.recipe.shrink(local(layer.weight), bits, self._progress.step, total)
            if not layer.recipe.frozen_mask or layer.transform.mode == "dense":
                continue
            bits = shard_bits(layer.transform.bits, layer.weight)
            mask_(local(layer.weight), bits)
            for value in optimizer.state.get(layer.weight, {}).values():
                if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                    mask_(local(value), bits)

    def detach(self, model: nn.Module) -> None:
        """Takes the masks off; the latent dense weights stay."""
        for layer in self.layers.values():
            unplug(layer.candidate.layer, "sparsity", parameter=layer.candidate.parameter)
        self.layers.clear()

    def reset(self) -> None:
        """Starts the recipe again from the weights as they are."""
        for layer in self.layers.values():
            layer.last_update, layer.pattern, layer.flip_rate = -1, None, None
            layer.transform.reset()
            if not self._calibrated:
                layer.transform.reset_signals()
        self._started = False

    def logs(self) -> dict[str, float | Tensor]:
        """Decay of the pruned weights, achieved sparsity of what the forward pass used, mask flip rate."""
        kept = total = 0.0
        for layer in self.layers.values():
            transform, size = layer.transform, layer.weight.numel()
            n, m = layer.pattern or (1, 1)
            kept += size * (n / m if transform.mode == "hard" else 1.0)
            total += size
        found: dict[str, float | Tensor] = {"sparsity": 1 - kept / max(total, 1)}
        if self._position is not None:
            found["decay"] = self._position[1]
        flips = [layer.flip_rate for layer in self.layers.values() if layer.flip_rate is not None]
        if flips:
            found["flip_rate"] = sum(flips) / len(flips)
        return found

    def finish(self) -> list[str]:
        """Says which layers don't have their target pattern at the end."""
        if any(layer.recipe.ends_dense for layer in self.layers.values()):
            return [f"{self.name} ({self.settings.recipe}): the recipe ends dense, so folding gives a dense model"]
        late = [
            name
            for name, layer in self.layers.items()
            if layer.transform.mode != "hard" or layer.pattern != (layer.recipe.n, layer.recipe.m)
        ]
        if not late:
            return []
        return [
            f"{self.name} ({self.settings.recipe}): training ended before the final pattern on "
            f"{len(late)} layers, the first is {late[0]}; train longer or shorten the schedule"
        ]

    def state_dict(self) -> dict[str, Any]:
        """Last mask update and pattern per layer; the masks themselves are buffers of the model, in bits."""
        return {
            name: [layer.last_update, list(layer.pattern) if layer.pattern else None, layer.flip_rate]
            for name, layer in self.layers.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            LossplugError: The checkpoint was made with other layers.
        """
        if set(state) != set(self.layers):
            other = sorted(set(state) ^ set(self.layers))
            raise LossplugError(
                f"the checkpoint holds masks of {len(state)} layers, this model selects {len(self.layers)}; "
                f"the first difference is {other[0]}",
                where=self.name,
                remedy="Resume with the include, exclude and model of the first run",
            )
        for name, (last_update, pattern, flip_rate) in state.items():
            layer = self.layers[name]
            layer.last_update, layer.flip_rate = last_update, flip_rate
            layer.pattern = tuple(pattern) if pattern else None  # type: ignore[assignment]
