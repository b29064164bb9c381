"""Factors trained end to end: the logits of decoding from codes are pulled towards those of the dense cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_lossplug.kv_cache.end_to_end import train_end_to_end
from lightning_lossplug.kv_cache.factors import Factors
from lightning_lossplug.kv_cache.plan import KVFactors, LayerFactors
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
    layers = {index: _trainable(layer, device) for index, layer in factors.layers.items()}
    tensors = [t for layer in layers.values() for f in (layer.keys, layer.values) for t in (f.encode, f.decode)]
    groups = [{"params": [t], "lr": lr * float(t.detach().abs().mean())} for t in tensors]
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
    done = {
        index: dataclasses.replace(layer, keys=_plain(layer.keys), values=_plain(layer.values))
        for index, layer in layers.items()
    }
    return dataclasses.replace(factors, layers=done)


def _trainable(layer: LayerFactors, device: torch.device) -> LayerFactors:
    def copy(factors: Factors) -> Factors:
        mean = None if factors.mean is None else factors.mean.to(device)
        encode, decode = (t.detach().to(device).clone().requires_grad_() for t in (factors.encode, factors.decode))
        return Factors(encode, decode, mean)

    return dataclasses.replace(layer, keys=copy(layer.keys), values=copy(layer.values))


def _plain(factors: Factors) -> Factors:
    mean = None if factors.mean is None else factors.mean.cpu()
    return Factors(factors.encode.detach().cpu(), factors.decode.detach().cpu(), mean)
