"""SLoRB: a small dense product beside a sparse one, over sums of blocks of inputs.

Source: Huang et al., AAAI 2025, arXiv 2407.20584 (the boosted variant of AST).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.nm_ast import AST_PAPER
from lightning_lossplug.sparsity.nm_mask import nm_mask
from lightning_lossplug.surgery.plug import latent, plain_class
from lightning_lossplug.surgery.select import Candidate, Selection, require_taken, select

NAME = "slorb"


@register("function", "slorb_output", family="nm_sparsity", paper=AST_PAPER, arxiv="2407.20584")
def slorb_output(x: Tensor, s: Tensor) -> Tensor:
    """Returns ``S (P x)``, ``[..., out]``, where ``P x`` are the sums of blocks of k consecutive inputs.

    Args:
        x: Inputs, ``[..., d]``.
        s: ``[out, d / k]``, which says k; zeros give zeros.
    """
    return F.linear(x.unflatten(-1, (s.shape[1], -1)).sum(-1), s)


@register("function", "slorb_start", family="nm_sparsity", paper=AST_PAPER, arxiv="2407.20584")
def slorb_start(weight: Tensor, mask: Tensor, k: int = 16) -> Tensor:
    """Returns ``S = mean of (1 - mask) W`` over blocks of k inputs, ``[out, d / k]``.

    The mean is over all k entries of a block, kept ones counting as 0: of all S it leaves the least
    ``||(1 - mask) W - S P||``.

    Args:
        weight: Dense weight, ``[out, d]``.
        mask: Its mask, true where kept.
        k: Inputs per block, a divisor of d; 16 to 64 in the paper.

    Raises:
        LossplugError: ``k`` doesn't divide d.
    """
    if k < 1 or weight.shape[1] % k:
        raise LossplugError(
            f"blocks of k={k} don't divide the {weight.shape[1]} inputs", where=NAME, remedy="Choose a divisor, as 16"
        )
    return torch.where(mask, 0, weight.detach()).unflatten(1, (-1, k)).mean(-1)


class SLoRB(nn.Module):
    """The parameter ``S`` of one layer.

    Args:
        start: First value, ``[out, d / k]``.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Returns :func:`slorb_output`."""
        return slorb_output(x, self.s)


@register("function", "add_slorb", family="nm_sparsity", paper=AST_PAPER, arxiv="2407.20584")
@torch.no_grad()
def add_slorb(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    k: int = 16,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Selection:
    """Adds ``S (P x)`` to the output of linear layers, started with what their magnitude mask would prune, in place.

    Call it where the model is built, before optimizers; ``NMSparsity`` works on the same layers as ever. The layer
    is then N:M plus a dense part of ``1 / k`` of its size: report the two apart, for it is no N:M layer. ``fold`` keeps
    both, :func:`merge_slorb` gives a dense layer.

    Args:
        model: A model with dense, trained weights.
        n: Entries that will be kept per group.
        m: Group size.
        k: Inputs per block.
        include: As for ``NMSparsity``.
        exclude: Likewise.

    Returns:
        What was taken.

    Raises:
        LossplugError: Nothing is selected, or ``k`` or ``m`` doesn't divide the inputs of a layer.
    """

    def check(candidate: Candidate) -> str | None:
        if not issubclass(plain_class(candidate.layer), nn.Linear) or candidate.parameter != "weight":
            return f"a {plain_class(candidate.layer).__name__} is no linear layer"
        return "it has one already" if hasattr(candidate.layer, NAME) else None

    selection = select(model, include, exclude, check=check, technique=NAME)
    require_taken(selection, NAME)
    for candidate in selection.taken:
        weight = latent(candidate.layer)
        try:
            start = slorb_start(weight, nm_mask(weight, n, m), k)
        except LossplugError as error:
            raise LossplugError(error.what, where=candidate.name, remedy=error.remedy) from None
        candidate.layer.add_module(NAME, SLoRB(start))
        candidate.layer.register_forward_hook(_boost)
    return selection


def _boost(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    boosted: Tensor = output + layer.get_submodule(NAME)(inputs[0])
    return boosted


@torch.no_grad()
def merge_slorb(model: nn.Module) -> nn.Module:
    """Adds every ``S P`` into its weight, which makes it dense, and takes the hooks off; in place, returns the model.

    Raises:
        LossplugError: A layer is still plugged.
    """
    for name, layer in model.named_modules():
        boost = getattr(layer, NAME, None)
        if not isinstance(boost, SLoRB):
            continue
        if plain_class(layer) is not type(layer):
            raise LossplugError("the layer is still plugged", where=name, remedy="Fold the model first")
        weight = layer.get_parameter("weight")
        weight.add_(boost.s.repeat_interleave(weight.shape[1] // boost.s.shape[1], 1))
        for key in [key for key, hook in layer._forward_hooks.items() if hook is _boost]:
            del layer._forward_hooks[key]
        delattr(layer, NAME)
    return model
