"""Activations of feed-forward layers: finding them, and a smooth count of those that aren't zero.

Nothing in a dense framework runs faster on sparse activations: a product with zeros costs what any product costs. What
can be faster is decoding one sequence at a time with a kernel that skips the rows and columns of zeros; this project
has none. The methods here train for such sparsity (DEFT), impose it (CHESS, CATS) and measure it (PPL-p%).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lossplug.errors import LossplugError, suggestion

_TORCH_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Hardswish,
    nn.Softplus,
)  # fmt: skip
_FOREIGN_ACTIVATIONS = ("transformers.activations", "timm.layers.activations")  # modules whose classes are activations


def find_activations(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Returns the activation modules of feed-forward layers by path, in model order.

    Args:
        model: Any model.
        include: Glob patterns of module paths, any module; None: activation modules (of torch, timm, transformers)
            that stand beside a linear layer in the same parent.
        exclude: Glob patterns that are left out.

    Raises:
        LossplugError: Nothing is found (a functional call such as ``F.gelu`` is no module).
    """
    found = {}
    for path, module in model.named_modules():
        if any(fnmatchcase(path, pattern) for pattern in exclude):
            continue
        if include is not None:
            chosen = any(fnmatchcase(path, pattern) for pattern in include)
        else:
            chosen = _is_activation(module) and _beside_linear(model.get_submodule(path.rpartition(".")[0]))
        if chosen:
            found[path] = module
    if not found:
        names = [path for path, module in model.named_modules() if _is_activation(module)]
        remedy = "The model has no activation modules; name the module whose output to use in include"
        if names:
            remedy = suggestion(include[0].strip("*.") if include else "", names)
        raise LossplugError(f"no activation matches include={include}", where="activations", remedy=remedy)
    return found


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, _TORCH_ACTIVATIONS) or type(module).__module__.startswith(_FOREIGN_ACTIVATIONS)


def _beside_linear(parent: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in parent.children())


def density(h: Tensor, eps: float = 1e-7, mask: Tensor | None = None) -> Tensor:
    r"""Returns the smooth share of non-zero activations of every sample: the mean of :math:`h^2 / (h^2 + \epsilon)`.

    0 where h is 0, close to 1 where :math:`|h| \gg \sqrt\epsilon`. The gradient :math:`2 h \epsilon / (h^2+\epsilon)^2`
    is large only around :math:`\sqrt\epsilon`, 3e-4 by default: activations that are far above it (GELU, SiLU) hardly
    move; a larger ``eps`` reaches them. Computed in float32 or wider; only ``h`` itself is kept for the backward pass.

    Args:
        h: Activations ``[B, ..., d]``.
        eps: > 0.
        mask: Bool or 0/1, of the shape of h without its last axis; tokens with 0 don't count.

    Returns:
        Shape ``[B]``; 0 for a sample whose tokens are all left out.

    Raises:
        LossplugError: ``eps`` isn't positive, fewer than two axes, or a mask of another shape.

    Source: From PEFT to DEFT, arXiv 2402.01911.
    """
    if not eps > 0:
        raise LossplugError(f"eps is {eps}, allowed is > 0", where="density")
    if h.ndim < 2:
        raise LossplugError(f"activations of shape {tuple(h.shape)}", where="density", remedy="Give [B, ..., d]")
    if mask is not None and mask.shape != h.shape[:-1]:
        raise LossplugError(
            f"a mask of shape {tuple(mask.shape)} doesn't fit activations of shape {tuple(h.shape)}", where="density"
        )
    return _Density.apply(h, mask, eps)


class _Density(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, mask: Tensor | None, eps: float) -> Tensor:
        square = h.to(torch.promote_types(h.dtype, torch.float32)).square()
        tokens = (square / (square + eps)).mean(-1).reshape(len(h), -1)
        weight = torch.ones_like(tokens) if mask is None else mask.reshape(len(h), -1).to(tokens.dtype)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        ctx.save_for_backward(h, weight)
        ctx.eps = eps
        return (tokens * weight).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        h, weight = ctx.saved_tensors
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        below = wide.square() + ctx.eps
        slope = 2 * wide * ctx.eps / below / below
        scale = (grads[0][:, None] * weight / h.shape[-1]).reshape(*h.shape[:-1], 1)
        return (scale * slope).to(h.dtype), None, None


class DensityPenalty:
    r"""The term :math:`\alpha \cdot \mathrm{mean}_{B,l} D_l` over the feed-forward activations of a model.

    With an encoder and a decoder, the means of both are added. Works under non-reentrant activation checkpointing: the
    hook computes the same in the recomputation, and only what a step computes the first time is counted.

    Args:
        alpha: Strength >= 0.
        eps: See :func:`density`.
        include: See :func:`find_activations`.
        exclude: Likewise.

    Raises:
        LossplugError: A value out of range.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        eps: float = 1e-7,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        if not alpha >= 0:
            raise LossplugError(f"alpha is {alpha}, allowed is >= 0", where="DensityPenalty")
        if not eps > 0:
            raise LossplugError(f"eps is {eps}, allowed is > 0", where="DensityPenalty")
        self.alpha, self.eps, self.include, self.exclude = alpha, eps, include, tuple(exclude)
        self.measure = False  # whether to count exact zeros too
        self.zeros: list[Tensor] = []
        self._found: dict[str, list[Tensor]] = {}
        self._masks: dict[str, Tensor | None] = {}
        self._armed = self._blocked = False
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> list[str]:
        """Hooks the activations of a model, and returns their paths."""
        found = find_activations(model, self.include, self.exclude)
        both = {"encoder", "decoder"} <= {part for path in found for part in path.split(".")}
        for path, module in found.items():
            side = "decoder" if both and "decoder" in path.split(".") else "encoder"
            self._handles.append(module.register_forward_hook(self._hook(side)))
        return list(found)

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, side: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if not module.training:
                return
            if not torch.is_grad_enabled():
                self._blocked |= self._armed
                return
            # Also when not armed: a recomputation has to save the tensors that the first pass saved.
            mask = self._masks.get(side)
            value = density(_tokens(output, mask), self.eps, mask).mean()
            if self._armed:
                self._found.setdefault(side, []).append(value)
                if self.measure:
                    self.zeros.append((output.detach() == 0).float().mean())

        return hook

    @contextmanager
    def armed(self, batch: Any = None) -> Iterator[None]:
        """Collects what the activations of one step give.

        Args:
            batch: A dict's ``attention_mask`` and ``decoder_attention_mask`` (else ``labels`` that aren't -100) say
                which tokens count; anything else: all do.
        """
        self._found, self.zeros, self._blocked = {}, [], False
        self._masks = _masks(batch)
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def term(self) -> Tensor:
        """Returns the mean density of the step (the sum of both sides' means), to be multiplied by ``alpha``.

        Raises:
            LossplugError: No activation ran in the step, or it ran without gradients.
        """
        if not self._found:
            why = "ran without gradients" if self._blocked else "ran in training mode"
            raise LossplugError(
                f"{'the activations' if self._blocked else 'none of the activations'} {why} in the training step",
                where="DensityPenalty",
                remedy="Checkpoint activations with use_reentrant=False"
                if self._blocked
                else "Name modules that the step calls in include",
            )
        return torch.stack([torch.stack(values).mean() for values in self._found.values()]).sum()


def _tokens(output: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape == output.shape[:-1]:
        return output
    if output.ndim == 2 and len(output) == mask.numel():
        return output.reshape(*mask.shape, -1)
    raise LossplugError(
        f"the attention mask of shape {tuple(mask.shape)} doesn't fit activations of shape {tuple(output.shape)}, "
        "so padding can't be left out",
        where="DensityPenalty",
        remedy="Leave such layers out with exclude, or train on batches without padding",
    )


def _masks(batch: Any) -> dict[str, Tensor | None]:
    if not isinstance(batch, dict) and not hasattr(batch, "keys"):
        return {}
    decoder = batch.get("decoder_attention_mask")
    if decoder is None and batch.get("labels") is not None:
        decoder = batch["labels"] != -100
    return {"encoder": batch.get("attention_mask"), "decoder": decoder}
