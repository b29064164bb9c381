"""CAST: pruned weights shrink by a sign decay, without a mask in the forward pass, until all are zero at the end.

Source of the idea: Huang et al. 2025, arXiv 2509.25996, the continuous successor of AST. No code of it was found, and
of its decay neither the schedule nor the normaliser: both are this library's own choice, so no parity is claimed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.bits import factors, pack_rows
from lightning_lossplug.sparsity.recipes import PhasedRecipe, StepState, need

CAST_PAPER = "CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language Models"


@register("function", "sign_decay_", family="nm_sparsity", paper=CAST_PAPER, arxiv="2509.25996")
@torch.no_grad()
def sign_decay_(weight: Tensor, mask: Tensor, remaining: int) -> Tensor:
    """Moves pruned weights towards zero by one amount per row, in place; kept weights stay as they are.

    ``W <- sign(W) max(|W| - s, 0)`` where the mask is 0, with ``s = max |W_pruned| / remaining`` over each index of the
    first axis: if nothing else moved them, the largest would fall linearly and meet zero with those of the other rows
    after the last step, where all become exactly 0.

    Args:
        weight: Dense weight.
        mask: Bool mask of its shape, true where kept, or its bits.
        remaining: Steps until the end, this one included, >= 1.

    Raises:
        LossplugError: ``remaining`` is below 1.
    """
    if remaining < 1:
        raise LossplugError(f"remaining is {remaining}, allowed is >= 1", where="sign_decay_")
    bits = mask if mask.dtype == torch.uint8 else pack_rows(mask)
    pruned = factors(bits, weight, 0.0, 1.0).mul_(weight)
    if remaining > 1 and pruned.numel():
        rows = pruned.view(len(pruned), -1)
        strength = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True) / remaining
        rows.clamp_(-strength, strength)
    return weight.sub_(pruned)  # w - clamp(w, -s, s) is sign(w) max(|w| - s, 0)


@register("recipe", "nm_cast", family="nm_sparsity", paper=CAST_PAPER, arxiv="2509.25996")
@dataclass(frozen=True)
class NMCAST(PhasedRecipe):
    """No mask in the forward pass: what a mask of now would prune is decayed by its sign, to exact zeros at the end.

    After each optimizer step, beside the optimizer's moments and whatever its learning rate, pruned weights shrink by
    :func:`~lightning_lossplug.sparsity.sign_decay_`. As on the paper's card: masks are refreshed every 10 steps, the
    decay is L1 and touches pruned weights alone, the model stays continuous in its weights and all of them reach zero
    together. Chosen here, since the paper's text was not found: the strength is adapted to the largest pruned weight of
    each row (a shard of rows needs no communication, and one outlier doesn't set the pace of a layer) and scheduled by
    ``1 / remaining steps``. Its learned scaling of weights is left out; its distillation from the dense model is a
    callback of its own (``Distillation``). Meant for a pretrained model.

    Until the end the forward pass is dense, and so are validation scores.

    Args:
        dense_fraction: Share of the run before the decay begins; 0 as published.
        finetune_fraction: Share of the run after it, in which pruned weights stay zero; 0 as published.
    """

    name = "nm_cast"
    shrinks = True
    mask_update_every: int = 10
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0

    def sparse(self, j: int, dense_end: int, total_steps: int | None) -> StepState:
        """A mask, but none in the forward pass."""
        need(total_steps is not None, "the training length is unknown", self, "Set max_steps, max_epochs, total_steps")
        return StepState("sparse", self.n, self.m, 1.0)

    def shrink(self, weight: Tensor, bits: Tensor, step: int, total_steps: int | None) -> None:
        """Decays pruned weights; in the fine-tune phase they are set to zero after every step."""
        start, end = self.boundaries(total_steps)
        if step >= start:
            sign_decay_(weight, bits, max(int(end) - step, 1))
