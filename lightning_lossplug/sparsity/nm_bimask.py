"""Bi-Mask: one mask for the forward product, a tighter one for the gradient of the input.

Source: Zhang et al., ICML 2023, arXiv 2302.06058.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.bits import masked, pack_rows, unpack_rows
from lightning_lossplug.sparsity.nm_mask import nm_mask
from lightning_lossplug.sparsity.recipes import PhasedRecipe, need
from lightning_lossplug.sparsity.ste import masked_ste
from lightning_lossplug.sparsity.transform import NMTransform
from lightning_lossplug.surgery.plug import latent, transform_of

BIMASK_PAPER = "Bi-directional Masks for Efficient N:M Sparse Training"


@register("mask", "backward_mask", family="nm_sparsity", paper=BIMASK_PAPER, arxiv="2302.06058")
def backward_mask(
    weight: Tensor, mask: Tensor, n: int, m: int, order: Tensor | None = None, output_axis: int = 0
) -> Tensor:
    """Returns ``B``: the entries of a mask that are also N:M along the outputs, taken in some order.

    ``W * mask`` with its outputs in that order keeps the N largest of every M along them; ``B`` is what both keep.

    Args:
        weight: Dense weight.
        mask: Its N:M mask F along the inputs.
        n: Entries kept per group.
        m: Group size, a divisor of the output axis.
        order: Permutation of the outputs; None: as they are.
        output_axis: The axis of the outputs.
    """
    masked = (weight.detach() * mask).movedim(output_axis, 0)
    order = torch.arange(len(masked), device=weight.device) if order is None else order
    along_outputs = nm_mask(masked[order], n, m, dim=0, check_finite=False)[order.argsort()]
    return mask & along_outputs.movedim(0, output_axis)


def best_order(
    weight: Tensor,
    mask: Tensor,
    n: int,
    m: int,
    current: Tensor,
    num_candidates: int = 100,
    output_axis: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the order of the outputs, of random ones and the current one, whose backward mask keeps most.

    Args:
        weight: Dense weight.
        mask: Its forward mask.
        n: Entries kept per group.
        m: Group size.
        current: The order so far, ``[out]``.
        num_candidates: Random orders to try.
        output_axis: The axis of the outputs.
        generator: Of the CPU; the same on every rank gives the same order.
    """
    best, most = current, int(backward_mask(weight, mask, n, m, current, output_axis).sum())
    for _ in range(num_candidates):
        order = torch.randperm(len(current), generator=generator).to(weight.device)
        kept = int(backward_mask(weight, mask, n, m, order, output_axis).sum())
        if kept > most:
            best, most = order, kept
    return best


class _InputGradient(torch.autograd.Function):
    """Hands an output through, and the gradient of the input on through another weight."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, weight: Tensor, layer: nn.Module) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.layer = inputs.shape, layer
        return output.clone()  # a view could not be changed in place by an activation behind it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        grad = grads[0]
        into = input_gradient(ctx.layer, ctx.shape, weight.to(grad.dtype), grad) if ctx.needs_input_grad[1] else None
        return grad, into, None, None


def input_gradient(layer: nn.Module, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
    """Returns the gradient of a layer's input for a weight of one's own.

    Args:
        layer: Linear, convolution (of zero padding) or transformers' ``Conv1D``, for its geometry.
        shape: Shape of the input.
        weight: The weight.
        grad: Gradient of the output.
    """
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        backward = {1: conv_grad.conv1d_input, 2: conv_grad.conv2d_input, 3: conv_grad.conv3d_input}[weight.ndim - 2]
        return backward(shape, weight, grad, layer.stride, layer.padding, layer.dilation, layer.groups)
    # transformers' Conv1D stores [in, out], torch's Linear [out, in].
    return F.linear(grad, weight) if hasattr(layer, "nf") else grad @ weight


def bimask_linear(x: Tensor, weight: Tensor, mask: Tensor, back: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns ``x (W F)^T + b`` whose gradients are ``g (W B)`` for x and the dense ``g^T x`` for W.

    With ``back`` equal to ``mask`` it is the straight-through linear layer.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        mask: Forward mask F.
        back: Backward mask B.
        bias: ``[out]``.
    """
    output = F.linear(x.detach(), masked_ste(weight, mask), bias)
    return _InputGradient.apply(output, x, (weight * back).detach(), nn.Identity())


class BiMaskTransform(NMTransform):
    """A masked weight whose layer sends the gradient of its input through the backward mask.

    Args:
        weight: The weight, for shape and device.
        axis: The reduction axis.
        output_axis: The axis of the outputs.
    """

    back_bits: Tensor
    order: Tensor

    def __init__(self, weight: Tensor, axis: int, output_axis: int) -> None:
        super().__init__(weight, axis=axis, output_axis=output_axis)
        self.register_buffer("back_bits", self.bits.clone())
        self.register_buffer("order", torch.arange(weight.shape[output_axis], device=weight.device))
        self.step = 0

    @property
    def back(self) -> Tensor:
        """The backward mask as a bool tensor, unpacked at each reading."""
        return unpack_rows(self.back_bits, self.shape)

    def plugged(self, layer: nn.Module, parameter: str) -> None:
        """Hooks the layer's input and output."""
        super().plugged(layer, parameter)
        layer.register_forward_pre_hook(_cut_input)
        layer.register_forward_hook(_route_gradient)

    def unplugged(self, layer: nn.Module, parameter: str) -> None:
        """Takes the hooks off."""
        super().unplugged(layer, parameter)
        for hooks, ours in ((layer._forward_pre_hooks, _cut_input), (layer._forward_hooks, _route_gradient)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
        vars(layer).pop("_bimask_input", None)

    def reset(self) -> None:
        """Also forgets the order."""
        super().reset()
        self.back_bits.copy_(self.bits)
        self.order.copy_(torch.arange(len(self.order)))


def _cut_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    transform = transform_of(layer, "sparsity")
    if not isinstance(transform, BiMaskTransform) or transform.mode != "hard" or not inputs[0].requires_grad:
        return None
    vars(layer)["_bimask_input"] = inputs[0]
    return (inputs[0].detach(), *inputs[1:])


def _route_gradient(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    seen = vars(layer).pop("_bimask_input", None)
    if seen is None:
        return None
    transform = transform_of(layer, "sparsity")
    assert isinstance(transform, BiMaskTransform)
    return _InputGradient.apply(output, seen, masked(latent(layer).detach(), transform.back_bits), layer)


@register("recipe", "nm_bimask", family="nm_sparsity", paper=BIMASK_PAPER, arxiv="2302.06058")
@dataclass(frozen=True)
class NMBiMask(PhasedRecipe):
    """SR-STE whose input gradients go through a second mask, which is N:M along the outputs in a searched order.

    Weight gradients are dense and get SR-STE's pull. The order of the outputs is searched anew every ``permute_every``
    steps. Groups lie as for every recipe here, along the input channels; the paper's code flattens the kernel into
    them. It shows what training with a sparse backward product does to a model; no kernel here makes it faster.

    Args:
        lambda_w: Strength of the pull, >= 0.
        permute_every: Optimizer steps between two searches, >= 1.
        num_candidates: Random orders per search, >= 0.
        seed: Of the orders; they are a function of it and the step.
        dense_fraction: 0 as published; set it to compare recipes at equal settings.
        finetune_fraction: 0 as published; likewise.
    """

    name = "nm_bimask"
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0
    lambda_w: float = 2e-4
    permute_every: int = 100
    num_candidates: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.lambda_w >= 0 and math.isfinite(self.lambda_w), f"lambda_w is {self.lambda_w}, allowed is >= 0", self)
        need(self.permute_every >= 1, f"permute_every is {self.permute_every}, allowed is >= 1", self)
        need(self.num_candidates >= 0, f"num_candidates is {self.num_candidates}, allowed is >= 0", self)

    @property
    def penalty(self) -> float:  # type: ignore[override]
        """Strength of the pull."""
        return self.lambda_w

    def misfit(self, length: int, output_length: int) -> str | None:
        """M divides both axes."""
        reason = super().misfit(length, output_length)
        if reason is None and output_length % self.m:
            reason = f"M = {self.m} does not divide the output axis of {output_length}"
        return reason

    def refuses(self, layer: nn.Module, parameter: str) -> str | None:
        """The layer's input has to be visible, and its geometry known."""
        if parameter != "weight" or type(layer).__name__.endswith("NonDynamicallyQuantizableLinear"):
            return "the gradient of its input can't be reached from outside"
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
                return f"a convolution with padding {layer.padding!r} of mode {layer.padding_mode!r}"
            if layer.groups > 1:
                return "a grouped convolution"
        return None

    def build_transform(self, weight: Tensor, axis: int, output_axis: int) -> NMTransform:
        """The transform with both masks."""
        return BiMaskTransform(weight, axis, output_axis)

    def tune(self, transform: NMTransform, step: int, total_steps: int | None) -> None:
        """Keeps the step, for the search."""
        assert isinstance(transform, BiMaskTransform)
        transform.step = step

    def new_bits(
        self, transform: NMTransform, weight: Tensor, n: int, m: int, scores: Tensor | None, first: bool
    ) -> Tensor:
        """The forward mask; the backward one goes into the transform."""
        assert isinstance(transform, BiMaskTransform)
        bits = super().new_bits(transform, weight, n, m, scores, first)
        mask = unpack_rows(bits, weight.shape)
        axis = transform.output_axis
        if first or transform.step % self.permute_every == 0:
            generator = torch.Generator().manual_seed(self.seed + transform.step)
            order = best_order(weight, mask, n, m, transform.order, self.num_candidates, axis, generator)
            transform.order.copy_(order)
        transform.back_bits.copy_(pack_rows(backward_mask(weight, mask, n, m, transform.order, axis)))
        return bits
