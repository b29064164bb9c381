"""Reconstruction training of all layers on the tokens themselves, through the rounding of few-bit codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import AttentionBlock, Tap, join_heads, rotary_tables
from lightning_lossplug.kv_cache.decode_mode import through_codes
from lightning_lossplug.kv_cache.plan import (
    KVFactors,
    LayerFactors,
    detached_factors,
    relative_groups,
    trainable_factors,
)
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.shrink import run_batches
from lightning_lossplug.losses.checks import check_number


def stream_factors(
    model: nn.Module,
    factors: KVFactors,
    texts: Sequence[Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    report: Callable[[int, float], None] | None = None,
) -> KVFactors:
    r"""Trains encoders and decoders layer by layer on text; the model stays as it is.

    Minimises :math:`\sum_l \mathrm{MSE}(K_l, \hat K_l) + \mathrm{MSE}(V_l, \hat V_l)` over tokens and channels by AdamW
    with a learning rate that falls linearly to 0. Attention sees the exact keys and values, so layers are independent,
    and a layer's graph is freed before the next one begins. Codes of fewer than 16 bits are trained straight through
    their rounding; no entry is clipped, since a range spans its group. Without rounding, moments say the same in less
    time (:func:`train_factors`), and the closed form is the optimum. (CSKV, arXiv 2409.10593, does about 12k steps of
    1024 tokens.)

    Args:
        model: A decoder of transformers.
        factors: To start from.
        texts: int64 ``[B, T]`` token ids without padding; gone through again if there are more steps.
        steps: Steps, >= 1.
        lr: Learning rate at the start, relative to the mean size of every tensor's entries.
        report: Called with step and loss.

    Returns:
        The trained factors, with the errors of the start.

    Raises:
        LossplugError: No texts, a value out of range, or a loss that is not finite.
    """
    check_number("stream_factors", "steps", steps, least=1)
    check_number("stream_factors", "lr", lr, above=0)
    if not texts:
        raise LossplugError("there are no texts", where="stream_factors")
    blocks = factors.check(model)
    device = next(iter(model.parameters())).device
    layers = {index: trainable_factors(layer, device) for index, layer in factors.layers.items()}
    groups = relative_groups(layers.values(), lr)
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    losses: list[Tensor] = []
    handles = [
        block.module.register_forward_pre_hook(_hook(block, layers[index], factors.settings, losses), with_kwargs=True)
        for index, block in blocks.items()
    ]
    try:
        for step in range(steps):
            losses.clear()
            optimizer.zero_grad()
            with torch.no_grad():
                run_batches(model, blocks, [texts[step % len(texts)]])
            loss = float(torch.stack(losses).sum())
            if not loss < float("inf"):
                raise LossplugError("the loss is not finite", where="stream_factors", remedy="Lower lr")
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            optimizer.step()
            if report is not None:
                report(step, loss)
    finally:
        for handle in handles:
            handle.remove()
    return dataclasses.replace(factors, layers={index: detached_factors(layer) for index, layer in layers.items()})


def _hook(block: AttentionBlock, layer: LayerFactors, settings: KVShrinkSettings, losses: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cos, sin = (table.float() for table in rotary_tables(block, kwargs))

        def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                plain = join_heads(block.rotary.unrotate(keys.detach().float(), cos, sin))[:, settings.sinks :]
                own = join_heads(values.detach().float())[:, settings.sinks :]
                loss = (through_codes(layer.keys, settings.k_bits, plain, plain.dtype) - plain).square().mean()
                loss = loss + (through_codes(layer.values, settings.v_bits, own, own.dtype) - own).square().mean()
                loss.backward()
            losses.append(loss.detach())
            return keys, values

        return args, {**kwargs, block.cache: Tap(see, kwargs.get(block.cache))}

    return hook
