"""MaskLLM: the weights stay, the mask is learned as a choice of one pattern per group.

Source: Fang et al., NeurIPS 2024, arXiv 2409.17481.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.bits import masked, pack_rows
from lightning_lossplug.sparsity.nm_mask import nm_mask
from lightning_lossplug.sparsity.recipes import PhasedRecipe, need
from lightning_lossplug.sparsity.transform import NMTransform
from lightning_lossplug.surgery.plug import latent

MASKLLM_PAPER = "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models"
MOST_PATTERNS = 256


@functools.cache
def nm_patterns(n: int, m: int) -> Tensor:
    """Returns every pattern of N ones in M places, ``[C(m, n), m]``, in lexicographic order.

    Raises:
        LossplugError: There are more than 256, so that the logits would dwarf the weights.
    """
    count = math.comb(m, n)
    if count > MOST_PATTERNS:
        raise LossplugError(
            f"{n}:{m} has {count} patterns, allowed are {MOST_PATTERNS}",
            where="nm_maskllm",
            remedy="Choose a smaller M, for example 2:4 (6 patterns) or 1:4 (4)",
        )
    patterns = torch.zeros(count, m)
    for row, choice in enumerate(itertools.combinations(range(m), n)):
        patterns[row, list(choice)] = 1.0
    return patterns


def sampled_mask(
    logits: Tensor, patterns: Tensor, tau: float | Tensor, kappa: float | Tensor, noise: Tensor | None = None
) -> Tensor:
    """Returns the soft masks ``y S`` with ``y = softmax((kappa pi + noise) / tau)``; the entries of a row add up to N.

    Args:
        logits: ``pi``, ``[G, P]``.
        patterns: ``S``, ``[P, M]``.
        tau: Temperature > 0; towards 0 a row becomes one pattern.
        kappa: Factor of the logits against the noise.
        noise: Gumbel noise ``[G, P]``; None: no noise, the mean choice.
    """
    scaled = kappa * logits if noise is None else kappa * logits + noise
    return F.softmax(scaled / tau, dim=-1) @ patterns


def add_prior(logits: Tensor, patterns: Tensor, groups: Tensor, strength: float = 3.0) -> Tensor:
    """Returns ``pi + strength std(pi) (S m0 - mean overlap)``: patterns near a known mask start ahead.

    The mean overlap of a pattern with m0 is ``N^2 / M``, which for 2:4 is the 1 in the paper's code.

    Args:
        logits: ``[G, P]``.
        patterns: ``[P, M]``.
        groups: ``m0``, the known mask per group, ``[G, M]``.
        strength: 0 adds nothing; towards infinity m0 is the choice.
    """
    overlap = groups.to(logits.dtype) @ patterns.t()
    return logits + strength * logits.std() * (overlap - overlap.mean(1, keepdim=True))


class MaskLLMTransform(NMTransform):
    """Reads a frozen weight through a sampled soft mask in training and through the last hard mask in evaluation.

    Args:
        weight: The weight; it is frozen until the transform is taken off.
        axis: The reduction axis.
        output_axis: The axis of the outputs.
        n: Entries kept per group.
        m: Group size.
        seed: Of the first logits, so that they are the same on every rank.
    """

    patterns: Tensor
    tau: Tensor
    kappa: Tensor

    def __init__(self, weight: Tensor, axis: int, output_axis: int, n: int, m: int, seed: int) -> None:
        super().__init__(weight, axis=axis, output_axis=output_axis)
        self.n, self.m, self.seed = n, m, seed
        self.trainable = weight.requires_grad
        weight.requires_grad_(False)
        patterns = nm_patterns(n, m)
        self.logits = nn.Parameter(torch.empty(weight.numel() // m, len(patterns), device=weight.device))
        self.register_buffer("patterns", patterns.to(weight.device), persistent=False)
        for name in ("tau", "kappa"):
            self.register_buffer(name, torch.ones((), dtype=torch.float32, device=weight.device))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draws the logits anew, ``N(0, 0.01^2)``."""
        super().reset()
        generator = torch.Generator().manual_seed(self.seed)
        self.logits.copy_(torch.empty(self.logits.shape).normal_(0, 0.01, generator=generator))

    def unplugged(self, layer: nn.Module, parameter: str) -> None:
        """The weight may train again."""
        super().unplugged(layer, parameter)
        latent(layer, parameter).requires_grad_(self.trainable)

    def to_weight(self, groups: Tensor) -> Tensor:
        """Brings ``[G, M]`` into the shape of the weight."""
        shape = list(self.shape)
        shape.append(shape.pop(self.axis))
        return groups.reshape(shape).movedim(-1, self.axis)

    def to_groups(self, values: Tensor) -> Tensor:
        """Brings a tensor of the weight's shape into ``[G, M]``."""
        return values.movedim(self.axis, -1).reshape(-1, self.m)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the effective weight."""
        weight = weight.detach()
        if self.mode == "dense":
            return weight
        if not self.training:
            return masked(weight, self.bits)
        noise = -torch.empty_like(self.logits).exponential_().log()
        # In full precision also under autocast: the temperatures go down to 0.05 and up to 500.
        with torch.autocast(weight.device.type, enabled=False):
            soft = sampled_mask(self.logits, self.patterns, self.tau, self.kappa, noise)
        return weight * self.to_weight(soft).to(weight.dtype)

    def choice(self) -> Tensor:
        """Returns the likeliest pattern of each group, ``[G, M]`` bool."""
        return self.patterns[self.logits.argmax(1)].bool()

    @torch.no_grad()
    def add_penalty(self, weight: Tensor, strength: float) -> None:
        """Adds the gradient of ``-strength ||W mask||_F^2`` to that of the logits, for the mask without noise."""
        if self.logits.grad is None or strength == 0:
            return
        y = F.softmax(self.kappa * self.logits / self.tau, dim=-1)
        soft = y @ self.patterns
        # d/dmask of -s (W mask)^2, then through y S and the softmax.
        above = -2 * strength * self.to_groups(weight).float().square() * soft @ self.patterns.t()
        jacobian = y * (above - (above * y).sum(1, keepdim=True))
        self.logits.grad.add_(jacobian * self.kappa / self.tau)


@register("recipe", "nm_maskllm", family="nm_sparsity", paper=MASKLLM_PAPER, arxiv="2409.17481")
@dataclass(frozen=True)
class NMMaskLLM(PhasedRecipe):
    """Weights frozen; per group a distribution over the patterns of N of M is learned on the loss.

    In training a group reads ``softmax((kappa pi + gumbel) / tau) S`` times its weights; in evaluation and when folded
    the likeliest pattern as of the last mask, also where an average of the logits is kept. ``tau`` and ``kappa`` move
    linearly over the run. The logits start near the mask of the chosen score (magnitude, ``wanda``). The term
    ``-lambda_t sum ||W mask||^2``, whose ``lambda_t`` falls linearly to 0, is added to the gradients once per optimizer
    step, after clipping, for the mask without noise: the same on every rank. Gumbel noise comes from each rank's own
    generator.

    The logits are parameters of the layer (P / M numbers per weight): give them a learning rate about ten times that
    of fine-tuning, 5e-4 in the paper, and no weight decay.

    Args:
        tau_range: Temperature at the start and the end, > 0.
        kappa_range: Factor of the logits at the start and the end, > 0.
        prior_strength: How far patterns near the first mask are ahead, >= 0.
        weight_reg: First value of ``lambda_t``, >= 0.
        seed: Of the first logits.
        dense_fraction: Without effect on frozen weights, so 0.
        finetune_fraction: Likewise.
    """

    name = "nm_maskllm"
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0
    tau_range: Sequence[float] = (4.0, 0.05)
    kappa_range: Sequence[float] = (100.0, 500.0)
    prior_strength: float = 3.0
    weight_reg: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        nm_patterns(self.n, self.m)
        for name in ("tau_range", "kappa_range"):
            value = getattr(self, name)
            need(len(value) == 2 and min(value) > 0, f"{name} is {value}", self, "Give its two ends, both > 0")
        for name in ("prior_strength", "weight_reg"):
            need(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, allowed is >= 0", self)

    def build_transform(self, weight: Tensor, axis: int, output_axis: int) -> NMTransform:
        """The learned mask; the weight is frozen."""
        return MaskLLMTransform(weight, axis, output_axis, self.n, self.m, self.seed)

    def new_bits(
        self, transform: NMTransform, weight: Tensor, n: int, m: int, scores: Tensor | None, first: bool
    ) -> Tensor:
        """The likeliest patterns; at first the prior is put into the logits."""
        assert isinstance(transform, MaskLLMTransform)
        if first:
            known = nm_mask(weight, n, m, transform.axis, scores)
            groups = transform.to_groups(known)
            transform.logits.copy_(add_prior(transform.logits, transform.patterns, groups, self.prior_strength))
        return pack_rows(transform.to_weight(transform.choice()))

    def tune(self, transform: NMTransform, step: int, total_steps: int | None) -> None:
        """Sets the temperatures."""
        need(
            total_steps is not None, "the training length is unknown", self, "Set max_steps, max_epochs or total_steps"
        )
        assert isinstance(transform, MaskLLMTransform)
        done = self._done(step, total_steps)
        for name, (start, end) in (("tau", self.tau_range), ("kappa", self.kappa_range)):
            getattr(transform, name).fill_(start + (end - start) * done)

    def _done(self, step: int, total_steps: int | None) -> float:
        return min(step / max(total_steps or 1, 1), 1.0)

    def penalise(
        self, transform: NMTransform, weight: Tensor, step: int, total_steps: int | None, grad_scale: float
    ) -> None:
        """Adds the gradient of the regulariser."""
        assert isinstance(transform, MaskLLMTransform)
        strength = self.weight_reg * (1 - self._done(step, total_steps))
        transform.add_penalty(weight, strength * grad_scale)
