"""S-STE: pruned by a continuous function, soft thresholds and one frozen scale per weight.

Source: Hu et al., NeurIPS 2024, arXiv 2409.09099.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.bits import unpack_rows
from lightning_lossplug.sparsity.nm_mask import group_axis, nm_mask
from lightning_lossplug.sparsity.recipes import PhasedRecipe, need
from lightning_lossplug.sparsity.saving import note
from lightning_lossplug.sparsity.transform import NMTransform

SSTE_PAPER = "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training"


@register("transform", "soft_threshold", family="nm_sparsity", paper=SSTE_PAPER, arxiv="2409.09099")
def soft_threshold(
    weight: Tensor, n: int = 2, m: int = 4, dim: Literal["in"] | int = "in", mask: Tensor | None = None
) -> Tensor:
    """Returns ``S(W) = sign(W) max(|W| - t, 0)``, with t the largest magnitude that each group prunes.

    At most N entries of a group are not zero (fewer where a kept entry equals t), and unlike a hard mask S is
    continuous: within a group ``max |S(w) - S(w')| <= 2 max |w - w'|``.

    Args:
        weight: Floating-point tensor.
        n: Entries kept per group; with ``n == m`` nothing is pruned and t is 0.
        m: Group size.
        dim: Axis of the groups, as for :func:`~lightning_lossplug.sparsity.nm_mask`.
        mask: The N:M mask, if it is known.

    Raises:
        LossplugError: As for ``nm_mask``.
    """
    axis = group_axis(weight, dim)
    if mask is None:
        mask = nm_mask(weight, n, m, axis)
    size = weight.abs()
    groups = (*weight.shape[:axis], weight.shape[axis] // m, m, *weight.shape[axis + 1 :])
    pruned = torch.where(mask, 0, size).reshape(groups)
    threshold = pruned.amax(axis + 1, keepdim=True).expand(groups).reshape(weight.shape)
    return weight.sign() * (size - threshold).clamp_min(0)


def rescale(weight: Tensor, soft: Tensor) -> Tensor:
    """Returns ``beta = <W, S> / <S, S>``, the factor that brings S closest to W (0-dim); 1 where S is all zero."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w, s = weight.to(wide).flatten(), soft.to(wide).flatten()
    energy = s @ s
    return torch.where(energy > 0, (w @ s) / torch.where(energy > 0, energy, 1), 1.0)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, soft: Tensor) -> Tensor:
        return soft.view_as(soft)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class SSTETransform(NMTransform):
    """Reads a weight as ``beta S(W)``; the gradient goes through unchanged.

    Args:
        weight: The weight, for shape and device.
        axis: The reduction axis.
        output_axis: The axis of the outputs.
        group: Group size M.
    """

    beta: Tensor

    def __init__(self, weight: Tensor, axis: int, output_axis: int, group: int) -> None:
        super().__init__(weight, axis=axis, output_axis=output_axis)
        self.group = group
        self.register_buffer("beta", torch.ones((), dtype=torch.float32, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the effective weight."""
        if self.mode == "dense":
            return weight
        value = _Identity.apply(weight, self.make(weight))
        note(value, self.make, weight)
        return value

    @torch.no_grad()
    def make(self, weight: Tensor) -> Tensor:
        """Returns its value, without a gradient."""
        return soft_threshold(weight, 1, self.group, self.axis, self.mask) * self.beta.to(weight.dtype)

    def reset(self) -> None:
        """Also forgets the scale."""
        super().reset()
        self.beta.fill_(1.0)


@register("recipe", "nm_sste", family="nm_sparsity", paper=SSTE_PAPER, arxiv="2409.09099")
@dataclass(frozen=True)
class NMSSTE(PhasedRecipe):
    """``W~ = beta S(W)`` with soft thresholds, a scale per weight that is frozen at the start, and the gradient of STE.

    Folding writes ``beta S(W)``.

    Args:
        rescale: ``fixed`` (``beta = <W, S> / <S, S>`` when the sparse phase begins) or ``none`` (1).
        dense_fraction: Share of the run before the start; 0 as published.
        finetune_fraction: 0 as published; set it to compare recipes at equal settings.
    """

    name = "nm_sste"
    takes_scores = False  # the threshold is a magnitude
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0
    rescale: Literal["fixed", "none"] = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.rescale in ("fixed", "none"), f"rescale is {self.rescale!r}", self, "Use 'fixed' or 'none'")

    def build_transform(self, weight: Tensor, axis: int, output_axis: int) -> NMTransform:
        """The soft threshold."""
        return SSTETransform(weight, axis, output_axis, self.m)

    def new_bits(
        self, transform: NMTransform, weight: Tensor, n: int, m: int, scores: Tensor | None, first: bool
    ) -> Tensor:
        """The mask, and once the scale."""
        assert isinstance(transform, SSTETransform)
        bits = super().new_bits(transform, weight, n, m, scores, first)
        if first and self.rescale == "fixed":
            mask = unpack_rows(bits, weight.shape)
            transform.beta.copy_(rescale(weight, soft_threshold(weight, n, m, transform.axis, mask)))
        return bits
