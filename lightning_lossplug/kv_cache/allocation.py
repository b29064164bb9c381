"""How many code channels every key and value projection gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.factors import check_rank
from lightning_lossplug.losses.checks import check_number


def rank_of_ratio(width: int, ratio: float, where: str = "rank_of_ratio") -> int:
    """Returns the channels that are left when a share ``ratio`` of ``width`` is removed, rounded down.

    Raises:
        LossplugError: A ratio outside [0, 1), or one that leaves nothing.
    """
    check_number(where, "ratio", ratio, least=0, below=1)
    return check_rank(math.floor(width * (1 - ratio) + 1e-9), width, where)


def allocate_ranks(
    spectra: Sequence[Tensor],
    costs: Sequence[float],
    budget: float,
    *,
    weights: Sequence[float] | None = None,
    absolute: bool = False,
) -> list[int]:
    r"""Spends a budget of bytes on channels where they remove the most error.

    Minimises :math:`\sum_b w_b \sum_{i > r_b} \lambda_{b,i} / \sum_i \lambda_{b,i}` under
    :math:`\sum_b r_b\,\mathrm{cost}_b \le` budget. The errors are convex in the ranks, so taking the channels in the
    order of gain per byte is optimal up to the last channel. Every branch gets at least one.

    Args:
        spectra: Eigenvalues of every branch in falling order, ``[c]`` each.
        costs: Bytes per token of one channel of every branch.
        budget: Bytes per token.
        weights: Importance of the relative error of every branch; None for 1.
        absolute: Eigenvalues of all branches are in one unit already (loss, say): don't divide them by their sum.

    Raises:
        LossplugError: The budget is too small for one channel each.
    """
    least = sum(costs)
    if budget < least:
        raise LossplugError(
            f"the budget of {budget:.4g} bytes per token is too small",
            where="allocate_ranks",
            remedy=f"One channel for each of the {len(costs)} projections takes {least:.4g} bytes",
        )
    branches, gains, bytes_ = [], [], []
    for index, (spectrum, cost) in enumerate(zip(spectra, costs, strict=True)):
        share = spectrum.double().clamp_min(0)
        if not absolute:
            share = share / share.sum().clamp_min(1e-300)
        weight = 1.0 if weights is None else weights[index]
        gains.append(share[1:] * (weight / cost))
        branches.append(torch.full((len(share) - 1,), index))
        bytes_.append(torch.full((len(share) - 1,), float(cost), dtype=torch.float64))
    order = torch.cat(gains).argsort(descending=True, stable=True)
    affordable = torch.cat(bytes_)[order].cumsum(0) <= budget - least + 1e-9
    taken = torch.cat(branches)[order[affordable]]
    return [1 + int((taken == index).sum()) for index in range(len(costs))]
