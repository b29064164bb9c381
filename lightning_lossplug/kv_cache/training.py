"""Reconstruction training of low-rank factors from a Gram matrix instead of a stream of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number


def reconstruction_loss(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Returns the mean squared error of :math:`X A B` against :math:`X W` over tokens and channels (CSKV's loss)."""
    return (x @ weight - x @ a @ b).square().mean()


def gram_loss(gram: Tensor, weight: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    r"""Returns :func:`reconstruction_loss` from second moments alone.

    :math:`\mathrm{tr}\big((W - A B)^\top\, E[x x^\top]\, (W - A B)\big) / c`. Batches of layers are allowed: every
    argument may have a leading axis, and the result then has one value per layer.

    Args:
        gram: :math:`E[x x^\top]` (the Gram matrix over the number of tokens), ``[..., h, h]``.
        weight: W, ``[..., h, c]``; None for the identity.
        a: A, ``[..., h, r]``.
        b: B, ``[..., r, c]``.
    """
    product = a @ b
    target = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) if weight is None else weight
    rest = target - product
    return (rest * (gram @ rest)).sum((-2, -1)) / rest.shape[-1]


def train_factors(
    gram: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, *, steps: int = 1000, lr: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Lowers :func:`gram_loss` by Adam with a learning rate that falls linearly to 0.

    Layers are independent, so a batch of them trains at once. From :func:`asvd_init` it moves towards the closed form
    (:func:`whitened_init`) and never below it. The gram is divided by its mean diagonal first, so that the size of the
    activations doesn't matter. (CSKV, arXiv 2409.10593, streams tokens for about 12k steps at 5e-5.)

    Args:
        gram: :math:`E[x x^T]`, ``[..., h, h]``.
        weight: W, ``[..., h, c]``; None for the identity.
        a: A to start from, ``[..., h, r]``.
        b: B to start from, ``[..., r, c]``.
        steps: Steps, >= 0.
        lr: Learning rate at the start.

    Returns:
        The A and B of the smallest loss seen, in the dtype they came in.

    Raises:
        LossplugError: Negative ``steps`` or ``lr``, or a loss that is not finite.
    """
    check_number("train_factors", "steps", steps, least=0)
    check_number("train_factors", "lr", lr, least=0)
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram / size
    a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    best, kept = (
        torch.full(gram.shape[:-2], float("inf"), dtype=gram.dtype, device=gram.device),
        (a.detach(), b.detach()),
    )
    optimizer = torch.optim.Adam([a, b], lr=lr)
    with torch.enable_grad():
        for step in range(steps + 1):
            losses = gram_loss(gram, weight, a, b)
            if not bool(losses.isfinite().all()):
                raise LossplugError("the reconstruction loss is not finite", where="train_factors", remedy="Lower lr")
            better = (losses.detach() < best)[..., None, None]
            best = torch.minimum(best, losses.detach())
            kept = (torch.where(better, a.detach(), kept[0]), torch.where(better, b.detach(), kept[1]))
            if step == steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
    return kept
