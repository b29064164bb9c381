"""Calibrating a language model for a shrunk cache, without a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import AttentionBlock
from lightning_lossplug.kv_cache.plan import KVFactors, fit_factors
from lightning_lossplug.kv_cache.recorder import MomentRecorder
from lightning_lossplug.kv_cache.settings import KVShrinkSettings

_INPUTS = ("input_ids", "attention_mask")


@torch.no_grad()
def record_moments(model: nn.Module, batches: Iterable[Any], sinks: int = KVShrinkSettings.sinks) -> MomentRecorder:
    """Runs a model over token ids and records the moments of its keys and values.

    The memory of what is recorded doesn't depend on how many tokens there are.

    Args:
        model: A decoder of transformers, or a module that holds one; its mode (``train`` or ``eval``) is restored.
        batches: int64 ``[B, T]`` tensors, or dicts with ``input_ids`` and perhaps ``attention_mask``.
        sinks: First tokens of every row that are left out (:class:`KVShrinkSettings`).

    Raises:
        LossplugError: No layer whose cache can be shrunk, or a batch without token ids.
    """
    recorder = MomentRecorder(model, sinks)
    backbone = _backbone(model, recorder.blocks)
    device = next(iter(backbone.parameters())).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with recorder:
            for batch in batches:
                if not isinstance(batch, Tensor) and "input_ids" not in batch:
                    raise LossplugError("a batch has no input_ids", where="calibration")
                found = {"input_ids": batch} if isinstance(batch, Tensor) else batch
                inputs = {name: found[name].to(device) for name in _INPUTS if found.get(name) is not None}
                backbone(**inputs, use_cache=False)
    finally:
        for module, mode in modes:
            module.training = mode
    return recorder


def shrink_kv(model: nn.Module, batches: Iterable[Any], settings: KVShrinkSettings | None = None) -> KVFactors:
    """Calibrates a model on some text and returns the factors of its shrunk cache.

    Args:
        model: A decoder of transformers.
        batches: int64 ``[B, T]`` token ids, or dicts with ``input_ids`` and perhaps ``attention_mask``.
        settings: Ranks, bits, window; None for the defaults.

    Raises:
        LossplugError: No rotary layout that is known, too little text (the message says how much is needed), a rank
            of 0, a budget that is too small.
    """
    settings = settings or KVShrinkSettings()
    return fit_factors(model, record_moments(model, batches, settings.sinks), settings)


def _backbone(model: nn.Module, blocks: dict[int, AttentionBlock]) -> nn.Module:
    """The innermost module that takes token ids and holds all blocks: without a head, whose logits nobody reads."""
    found = model
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if "input_ids" in inspect.signature(module.forward).parameters and all(
            block.path.startswith(prefix) for block in blocks.values()
        ):
            found = module
    return found
