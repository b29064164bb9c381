"""Factors trained end to end: the logits of decoding from codes are pulled towards those of the dense cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from lightning_lossplug.kv_cache.end_to_end import train_end_to_end
from lightning_lossplug.kv_cache.plan import KVFactors, detached_factors, relative_groups, trainable_factors
from lightning_lossplug.losses.checks import check_number


def distill_kv(
    model: nn.Module,
    factors: KVFactors,
    batches: Iterable[Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    prefill: int | None = None,
    report: Callable[[int, float], None] | None = None,
) -> KVFactors:
    r"""Trains encoders and decoders of all layers together; the model stays as it is.

    Minimises :math:`\mathrm{KL}(p_{\mathrm{dense}} \,\|\, p_{\mathrm{codes}})` of the next token, averaged over the
    rows from ``prefill`` on, by Adam with a learning rate that falls linearly to 0. Errors that later layers undo cost
    nothing here, unlike in the layer-local closed form, which is the place to start; it pays at extreme ratios. Few-bit
    codes are trained straight through their rounding. Each step costs two forward passes and a backward pass. (CSKV
    has a weight for such a term and sets it to 0; MatryoshkaKV, arXiv 2410.14731, trains its bases like this.)

    Args:
        model: A causal language model.
        factors: To start from.
        batches: int64 ``[B, T]`` token ids; as many as there are steps, or fewer, which are gone through again.
        steps: Steps, >= 1.
        lr: Learning rate at the start, relative to the mean size of every tensor's entries.
        prefill: Rows before it see exact tokens; None: the first quarter of a text.
        report: Called with step and loss.

    Returns:
        The trained factors. Their errors are those of the start, which no longer say how good they are.

    Raises:
        LossplugError: No batches, a value out of range, or a loss that is not finite.
    """
    check_number("distill_kv", "steps", steps, least=1)
    check_number("distill_kv", "lr", lr, above=0)
    device = next(iter(model.parameters())).device
    layers = {index: trainable_factors(layer, device) for index, layer in factors.layers.items()}
    groups = relative_groups(layers.values(), lr)
    moving = dataclasses.replace(factors, layers=layers)
    train_end_to_end(
        model,
        list(batches),
        groups,
        lambda step: moving,
        steps=steps,
        prefill=prefill,
        report=report,
        where="distill_kv",
    )
    return dataclasses.replace(factors, layers={index: detached_factors(layer) for index, layer in layers.items()})
