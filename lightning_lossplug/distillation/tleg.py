"""Transformer blocks of any depth from two sets of weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lossplug.distillation.taps import find_submodule
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


@register("function", "tleg", family="distillation", paper="Transformer as Linear Expansion of Learngene")
class LinearExpansion(nn.Module):
    r"""A stack of ``depth`` blocks with the weights :math:`W_l = W_{base} + \frac{l}{L} W_{slope}`, l = 0 … L - 1.

    Takes the place of the list of blocks of an auxiliary network, which is trained by distillation alone (``kd`` at
    ``ce_weight=0``; the released code divides by the number of classes, so its weight is 1/C of ``kd``'s). Then
    :meth:`expand` makes ordinary blocks for descendants of any depth, to be fine-tuned.

    Args:
        block: One block; its parameters are the base.
        depth: L.
        std: Of the slopes of matrices at the start; those of vectors (norms, biases) start at 0.
    """

    def __init__(self, block: nn.Module, depth: int, std: float = 0.02) -> None:
        super().__init__()
        check_number("tleg", "depth", depth, least=1)
        check_number("tleg", "std", std, least=0)
        self.base, self.depth = block, int(depth)
        self.names = [name for name, _ in block.named_parameters()]
        slopes = [torch.zeros_like(p) for p in block.parameters()]
        for slope in slopes:
            if slope.ndim >= 2:
                nn.init.trunc_normal_(slope, std=std)
        self.slope = nn.ParameterList([nn.Parameter(s) for s in slopes])

    def weights(self, layer: int, depth: int) -> dict[str, Tensor]:
        """Returns the parameters of a layer of a stack of ``depth``."""
        share = layer / depth
        return {n: b + share * s for n, b, s in zip(self.names, self.base.parameters(), self.slope, strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        """Runs all blocks."""
        for layer in range(self.depth):
            x = functional_call(self.base, self.weights(layer, self.depth), (x,))
        return x

    @torch.no_grad()
    def expand(self, depth: int) -> nn.Sequential:
        """Returns a stack of ordinary blocks of another depth."""
        check_number("tleg", "depth", depth, least=1)
        blocks = []
        for layer in range(depth):
            block = copy.deepcopy(self.base)
            for p, value in zip(block.parameters(), self.weights(layer, depth).values(), strict=True):
                p.copy_(value)
            blocks.append(block)
        return nn.Sequential(*blocks)


def learngene(model: nn.Module, path: str = "blocks", std: float = 0.02) -> LinearExpansion:
    """Replaces a model's stack of blocks by their linear expansion, the first block as the base.

    Args:
        model: Calls the stack as one module, as timm's vision transformers do.
        path: Of the stack, an ``nn.Sequential``.
        std: See :class:`LinearExpansion`.

    Raises:
        LossplugError: There is no such stack.
    """
    stack = find_submodule(model, path, "tleg")
    if not isinstance(stack, nn.Sequential) or not len(stack):
        raise LossplugError(f"{path!r} is {type(stack).__name__}, expected a Sequential of blocks", where="tleg")
    made = LinearExpansion(stack[0], len(stack), std)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, made)
    return made


def descendant(model: nn.Module, depth: int, path: str = "blocks") -> nn.Module:
    """Returns a copy of a model trained with :func:`learngene`, with ordinary blocks of another depth.

    Raises:
        LossplugError: There is no linear expansion at the path.
    """
    twin = copy.deepcopy(model)
    stack = find_submodule(twin, path, "tleg")
    if not isinstance(stack, LinearExpansion):
        raise LossplugError(f"{path!r} is {type(stack).__name__}, no linear expansion", where="tleg")
    parent, _, name = path.rpartition(".")
    setattr(twin.get_submodule(parent), name, stack.expand(depth))
    return twin
