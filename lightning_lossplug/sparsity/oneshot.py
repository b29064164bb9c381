"""N:M pruning of a trained model in one call, by magnitude or by a score over calibration data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity.permutation import permute_for_sparsity
from lightning_lossplug.sparsity.scores import Score
from lightning_lossplug.sparsity.technique import NMSettings, NMTechnique
from lightning_lossplug.surgery.select import require_taken


@register(
    "function",
    "prune_nm",
    family="nm_sparsity",
    paper="A Simple and Effective Pruning Approach for Large Language Models (score wanda)",
    arxiv="2306.11695",
)
def prune_nm(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    score: str | Score = "magnitude",
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    include: list[str] | dict[str, str] | None = None,
    exclude: list[str] | None = None,
    indivisible: str = "error",
    allow_permutation: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Returns the model with at most N of every M weights left in the selected layers, without training.

    All layers are scored on the dense model; Wanda as published scores each block on the output of the pruned ones
    before it, which this does not.

    Args:
        model: A plain model.
        n: Weights kept per group.
        m: Group size.
        score: ``magnitude``, ``wanda``, ``gradient`` or a function.
        batches: Calibration data for a score that needs it: ``model(**batch)`` for mappings, ``model(batch[0])`` for
            tuples, otherwise ``model(batch)``.
        forward: Runs the model on a batch instead; returns the loss for ``gradient``.
        include: As for ``NMSparsity``; a mapping gives layers patterns of their own.
        exclude: As for ``NMSparsity``.
        indivisible: ``error`` or ``skip``.
        allow_permutation: First reorder hidden channels by
            :func:`~lightning_lossplug.sparsity.permute_for_sparsity`, checked on the first batch; for one N:M.
        inplace: Change the model itself, not a copy.

    Raises:
        LossplugError: No layer is selected, a pattern doesn't fit, or the score needs batches and there are none.

    Example:
        >>> sparse = prune_nm(model, 2, 4, score="wanda", batches=loader)  # doctest: +SKIP
    """
    settings = NMSettings(n, m, "nm_oneshot", include, exclude or [], indivisible, score=score)
    technique = NMTechnique(settings)
    if (technique.signals or allow_permutation) and batches is None:
        asks = "a permutation" if allow_permutation else f"the score {settings.score!r}"
        raise LossplugError(f"{asks} needs data", where="prune_nm", remedy="Give batches")
    model = model if inplace else copy.deepcopy(model)
    if allow_permutation:
        batches = list(batches or [])
        if isinstance(include, dict) or not batches:
            raise LossplugError(
                "a permutation needs one pattern for all layers and a batch",
                where="prune_nm",
                remedy="Give n and m, include as a list, and batches",
            )
        permute_for_sparsity(model, n, m, batch=batches[0], forward=forward)
    require_taken(technique.attach(model), "prune_nm")
    try:
        if batches is not None and technique.signals:
            technique.calibrate(model, batches, forward)
        technique.advance(Progress(0, 1))
    except BaseException:
        technique.detach(model)
        raise
    return technique.fold(model, inplace=True)
