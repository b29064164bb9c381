"""Orders of a layer's inputs that let an N:M mask keep more of it, folded into the layers before.

Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021; the search here is their greedy exchange of
columns between two groups, over random pairs of groups at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.calibration import run_batch
from lightning_lossplug.sparsity.nm_mask import group_axis, require_pattern
from lightning_lossplug.surgery.permute import find_links, unchanged
from lightning_lossplug.surgery.plug import plugged_layers

PERMUTATION_PAPER = "Channel Permutations for N:M Sparsity"


def kept_magnitude(columns: Tensor, n: int, m: int) -> Tensor:
    """Returns ``sum |W| mask`` of every group: ``[rows, C]`` -> ``[C / m]``."""
    return columns.abs().unflatten(1, (-1, m)).topk(n, dim=2).values.sum((0, 2))


@register("function", "permutation_search", family="nm_sparsity", paper=PERMUTATION_PAPER)
@torch.no_grad()
def permutation_search(
    weight: Tensor,
    n: int = 2,
    m: int = 4,
    dim: Literal["in"] | int = "in",
    *,
    rounds: int = 50,
    seed: int = 0,
) -> Tensor:
    """Returns an order of the inputs, ``[C]``, in which an N:M mask keeps at least as much magnitude as before.

    In every round the groups are paired at random and each pair exchanges the two columns that gain most, if any do.
    The search ends after ``rounds``, or when as many rounds in a row as there are groups brought nothing.

    Args:
        weight: ``[out, in, ...]``; all other axes count as rows.
        n: Entries kept per group.
        m: Group size, a divisor of the axis.
        dim: The axis of the inputs.
        rounds: Most rounds, each about ``2 m`` sorts of the weight; the first 20 bring most of the gain.
        seed: Of the pairings, drawn on the CPU, so that every rank finds the same order.

    Raises:
        LossplugError: A pattern that doesn't fit.
    """
    axis = group_axis(weight, dim)
    require_pattern(n, m)
    width = weight.shape[axis]
    if width % m:
        raise LossplugError(f"groups of m={m} don't divide axis {axis} of a weight of shape {tuple(weight.shape)}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    columns = weight.detach().to(wide).abs().movedim(axis, -1).reshape(-1, width)
    groups = width // m
    order = torch.arange(width, device=weight.device).view(groups, m)
    if n == m or groups < 2:
        return order.flatten()
    generator = torch.Generator().manual_seed(seed)
    idle = 0
    for _ in range(rounds):
        shuffled = torch.randperm(groups, generator=generator)[: groups // 2 * 2].to(weight.device)
        first, second = shuffled.view(2, -1)
        improved = _exchange(columns, order, first, second, n)
        idle = 0 if improved else idle + 1
        if idle >= groups:
            break
    return order.flatten()


def _exchange(columns: Tensor, order: Tensor, first: Tensor, second: Tensor, n: int) -> bool:
    """Exchanges the best two columns of each pair of groups, in place; tells whether any were."""
    m = order.shape[1]
    a, b = (columns[:, order[side]] for side in (first, second))  # [rows, pairs, m]
    kept = a.topk(n, dim=2).values.sum((0, 2)) + b.topk(n, dim=2).values.sum((0, 2))
    rest_a, last_a = _without_each(a, n)
    rest_b, last_b = _without_each(b, n)
    gains = torch.empty(len(first), m, m, device=columns.device, dtype=columns.dtype)
    for i in range(m):
        for j in range(m):
            moved = torch.maximum(last_a[i], b[:, :, j]) + torch.maximum(last_b[j], a[:, :, i])
            gains[:, i, j] = rest_a[i] + rest_b[j] + moved.sum(0) - kept
    gain, place = gains.flatten(1).max(1)
    better = gain > 1e-6 * kept  # rounding is no gain
    out, into = place // m, place % m
    x, y = order[first, out], order[second, into]
    order[first, out] = torch.where(better, y, x)
    order[second, into] = torch.where(better, x, y)
    return bool(better.any())


def _without_each(group: Tensor, n: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns, for each column left out, the sum of the n - 1 largest of the others and the n-th of each row.

    A column x that comes in makes the kept sum ``rest + max(n-th, x)``.
    """
    rests, lasts = [], []
    for i in range(group.shape[2]):
        others = torch.cat([group[:, :, :i], group[:, :, i + 1 :]], 2).topk(n, dim=2).values
        rests.append(others[:, :, :-1].sum((0, 2)))
        lasts.append(others[:, :, -1])
    return rests, lasts


@register("function", "permute_for_sparsity", family="nm_sparsity", paper=PERMUTATION_PAPER)
@torch.no_grad()
def permute_for_sparsity(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    layers: Sequence[str] | None = None,
    rounds: int = 50,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Reorders hidden channels in place so that N:M masks keep more; the network computes the same.

    Taken are the second layers of MLPs, of residual blocks and of ``nn.Sequential`` stacks, and fused experts (one
    order for all of them). Layers behind attention heads, sums of branches or unknown code stay as they are. Call it
    on the dense model before training or pruning; an optimizer that has momentum already doesn't know of it.

    Args:
        model: A plain (not plugged) model.
        n: Entries kept per group.
        m: Group size.
        batch: One batch to compare outputs on, in evaluation mode.
        forward: ``forward(model, batch)``; by default as in :func:`~lightning_lossplug.sparsity.prune_nm`.
        layers: Paths of the consumers to take; None: all that are found.
        rounds: Of :func:`permutation_search`.
        seed: Likewise.

    Returns:
        ``{path: (kept share before, after)}`` of the magnitude.

    Raises:
        LossplugError: The model is plugged, or its output changed; the weights are then as they were.
    """
    if any(True for _ in plugged_layers(model)):
        raise LossplugError(
            "the model is plugged already", where="permute_for_sparsity", remedy="Call it before the callback's fit"
        )
    run = forward or run_batch
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        before = run(model, batch)
        found: dict[str, tuple[float, float]] = {}
        done = []
        for link in find_links(model):
            if link.width % m or (layers is not None and link.name not in layers):
                continue
            weight, axis = link.consumer.weight, link.consumer.axis
            order = permutation_search(weight, n, m, axis, rounds=rounds, seed=seed)
            share = _kept_share(weight, n, m, axis)
            link.reorder(order)
            done.append((link, order))
            found[link.name] = (share, _kept_share(weight, n, m, axis))
        if not unchanged(before, run(model, batch)):
            for link, order in reversed(done):
                link.reorder(order.argsort())
            raise LossplugError(
                f"the output changed; one of {', '.join(found)} is not wired as its name says",
                where="permute_for_sparsity",
                remedy="Name the layers that are in layers=[...]",
            )
    finally:
        for module, training in modes:
            module.training = training
    return found


def _kept_share(weight: Tensor, n: int, m: int, axis: int) -> float:
    columns = weight.detach().movedim(axis, -1).reshape(-1, weight.shape[axis]).float()
    return float(kept_magnitude(columns, n, m).sum() / columns.abs().sum().clamp_min(torch.finfo(torch.float32).tiny))
