"""A pattern N:M for every layer under one budget: more weights where magnitude is spread out, fewer where it is not.

In every group the n-th largest weight adds less than the one before, so what a layer keeps is a concave function of N
and giving the next N to the layer that gains most per weight is the best choice (exact when layers are equally large;
otherwise the last step may leave a remainder). The goal and the greedy are this project's own, after the layer-wise
N:M schemes of DominoSearch (Sun et al., NeurIPS 2021); no parity with its search is claimed.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.nm_mask import group_axis, require_pattern
from lightning_lossplug.surgery.plug import latent
from lightning_lossplug.surgery.select import select


def kept_mass(weight: Tensor, m: int, dim: Any = "in") -> Tensor:
    """Returns the share of ``sum W^2`` that the n largest of every group hold, for n = 0 … M: ``[M + 1]``, concave.

    Args:
        weight: Floating-point tensor.
        m: Group size, a divisor of the axis.
        dim: As for :func:`~lightning_lossplug.sparsity.nm_mask`.

    Raises:
        LossplugError: M doesn't divide the axis.
    """
    axis = group_axis(weight, dim)
    require_pattern(1, m)
    if weight.shape[axis] % m:
        raise LossplugError(f"groups of m={m} don't divide axis {axis} of a weight of shape {tuple(weight.shape)}")
    squares = weight.detach().double().square().movedim(axis, -1).reshape(-1, m)
    total = squares.sum(0).sum().clamp_min(torch.finfo(torch.float64).tiny)
    ranked = squares.sort(dim=1, descending=True).values.sum(0)
    return torch.cat([ranked.new_zeros(1), ranked.cumsum(0) / total])


def allocate(
    curves: Sequence[Tensor], sizes: Sequence[int], budget: float, allowed: Sequence[int] | None = None
) -> list[int]:
    """Returns N per layer: the largest sum of kept shares with at most ``budget`` of all weights kept.

    Args:
        curves: :func:`kept_mass` of every layer, of one M.
        sizes: Weights of every layer.
        budget: Share of all weights that may stay, in (0, 1].
        allowed: Values of N to choose from, ascending; None: 1 … M.

    Raises:
        LossplugError: A budget out of range, or one that the smallest N exceeds.
    """
    m = len(curves[0]) - 1
    steps = sorted(allowed) if allowed is not None else list(range(1, m + 1))
    if not 0 < budget <= 1 or not steps or not all(1 <= n <= m for n in steps):
        raise LossplugError(
            f"budget is {budget} and N one of {steps} of M = {m}",
            where="search_patterns",
            remedy="Choose a budget in (0, 1] and 1 <= N <= M",
        )
    room = budget * sum(sizes) * m + 1e-6 - steps[0] * sum(sizes)
    if room < 0:
        raise LossplugError(
            f"the smallest pattern {steps[0]}:{m} keeps more than the budget of {budget}",
            where="search_patterns",
            remedy="Allow a smaller N, or choose a larger M",
        )
    place = [0] * len(sizes)

    def gain(layer: int) -> list[tuple[float, int, int]]:
        """The best next N of a layer by gain per weight; with gaps between the allowed values it may skip one."""
        now = steps[place[layer]]
        ahead = [
            (-float(curves[layer][n] - curves[layer][now]) / ((n - now) * sizes[layer]), layer, k)
            for k, n in enumerate(steps)
            if n > now
        ]
        return [min(ahead)] if ahead else []

    heap = [entry for layer in range(len(sizes)) for entry in gain(layer)]
    heapq.heapify(heap)
    while heap:
        _, layer, k = heapq.heappop(heap)
        cost = (steps[k] - steps[place[layer]]) * sizes[layer]
        if cost > room:
            continue  # too large a layer for what is left; a smaller one may still fit
        room -= cost
        place[layer] = k
        for entry in gain(layer):
            heapq.heappush(heap, entry)
    return [steps[k] for k in place]


@register("function", "search_patterns", family="nm_sparsity", paper="DominoSearch (layer-wise N:M schemes)")
def search_patterns(
    model: nn.Module,
    m: int = 8,
    budget: float = 0.5,
    *,
    allowed: Sequence[int] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Returns ``{layer: "n:m"}`` for ``NMSparsity(include=...)``, under one budget for all selected layers.

    Layers that the budget lets keep everything are left out of the mapping, and so stay dense. Layers whose reduction
    axis M doesn't divide are not touched and don't count.

    Args:
        model: A trained model; its weights decide.
        m: Group size of all layers.
        budget: Share of the selected weights that may stay, in (0, 1].
        allowed: Values of N to choose from, for example ``[1, 2, 4, 8]``; None: all.
        include: As for ``NMSparsity``.
        exclude: As for ``NMSparsity``.
        scores: Layer -> what stands for its magnitudes (wanda scores, say).

    Raises:
        LossplugError: No layer is selected, or the budget is below the smallest pattern.

    Example:
        >>> NMSparsity(include=search_patterns(model, m=8, budget=0.25), recipe="nm_srste")  # doctest: +SKIP
    """

    def check(candidate: Any) -> str | None:
        if candidate.reduction_axis is None:
            return "an embedding has no reduction axis"
        length = candidate.shape[candidate.reduction_axis]
        return f"{m} does not divide its reduction axis of {length}" if length % m else None

    taken = select(model, include, exclude, check=check, technique="search_patterns").taken
    if not taken:
        raise LossplugError("no layer selected", where="search_patterns", remedy="Name the layers in include")
    weights = [(scores or {}).get(c.name, latent(c.layer, c.parameter)) for c in taken]
    curves = [kept_mass(weight, m, c.reduction_axis) for weight, c in zip(weights, taken, strict=True)]
    sizes = [weight.numel() for weight in weights]
    chosen = allocate(curves, sizes, budget, allowed)
    return {c.name: f"{n}:{m}" for c, n in zip(taken, chosen, strict=True) if n < m}
