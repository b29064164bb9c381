"""Calibrating a language model for a shrunk cache, without a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import AttentionBlock
from lightning_lossplug.kv_cache.gradients import gradient_moments
from lightning_lossplug.kv_cache.plan import KVFactors, fit_factors
from lightning_lossplug.kv_cache.recorder import MomentRecorder
from lightning_lossplug.kv_cache.settings import KVShrinkSettings

GRADIENT_EVERY = 8  # batches; a backward pass costs about as much as a forward pass
_INPUTS = ("input_ids", "attention_mask")


@torch.no_grad()
def record_moments(
    model: nn.Module,
    batches: Iterable[Any],
    sinks: int = KVShrinkSettings.sinks,
    gradients: bool = False,
    *,
    autocast: bool = False,
) -> MomentRecorder:
    """Runs a model over token ids and records the moments of its keys and values.

    The memory of what is recorded doesn't depend on how many tokens there are.

    Args:
        model: A decoder of transformers, or a module that holds one; its mode (``train`` or ``eval``) is restored.
        batches: int64 ``[B, T]`` tensors, or dicts with ``input_ids`` and perhaps ``attention_mask``.
        sinks: First tokens of every row that are left out (:class:`KVShrinkSettings`).
        gradients: Of every eighth batch, record the gradients of the loss, too (:func:`gradient_moments`).
        autocast: Multiply in bfloat16, which takes about half the time where a processor can; sums stay float64.

    Raises:
        LossplugError: No layer whose cache can be shrunk, a batch without token ids, or gradients of a model without
            a loss.
    """
    recorder = MomentRecorder(model, sinks)

    def backward(inputs: dict[str, Tensor]) -> None:
        for index, pair in gradient_moments(model, recorder.blocks, inputs, sinks).items():
            recorder.layers[index].add_gradients(pair)

    device = next(iter(model.parameters())).device
    with recorder, torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        run_batches(model, recorder.blocks, batches, backward if gradients else None)
    return recorder


def run_batches(
    model: nn.Module,
    blocks: dict[int, AttentionBlock],
    batches: Iterable[Any],
    backward: Callable[[dict[str, Tensor]], None] | None = None,
) -> None:
    """Runs a model over token ids in ``eval`` mode, without its head.

    Args:
        model: A decoder of transformers, or a module that holds one; its mode is restored.
        blocks: Its attention blocks.
        batches: int64 ``[B, T]`` tensors, or dicts with ``input_ids`` and perhaps ``attention_mask``.
        backward: Called with every eighth batch instead.

    Raises:
        LossplugError: A batch without token ids.
    """
    backbone = _backbone(model, blocks)
    device = next(iter(backbone.parameters())).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for number, batch in enumerate(batches):
            if not isinstance(batch, Tensor) and "input_ids" not in batch:
                raise LossplugError("a batch has no input_ids", where="calibration")
            found = {"input_ids": batch} if isinstance(batch, Tensor) else batch
            inputs = {name: found[name].to(device) for name in _INPUTS if found.get(name) is not None}
            if backward is not None and number % GRADIENT_EVERY == 0:
                backward(inputs)
            else:
                backbone(**inputs, use_cache=False)
    finally:
        for module, mode in modes:
            module.training = mode


def shrink_kv(
    model: nn.Module, batches: Iterable[Any], settings: KVShrinkSettings | None = None, *, autocast: bool = False
) -> KVFactors:
    """Calibrates a model on some text and returns the factors of its shrunk cache.

    Args:
        model: A decoder of transformers.
        batches: int64 ``[B, T]`` token ids, or dicts with ``input_ids`` and perhaps ``attention_mask``.
        settings: Ranks, bits, window; None for the defaults.
        autocast: Calibrate in bfloat16 (:func:`record_moments`).

    Raises:
        LossplugError: No rotary layout that is known, too little text (the message says how much is needed), a rank
            of 0, a budget that is too small.
    """
    settings = settings or KVShrinkSettings()
    kept = list(batches) if settings.looks_at_text else []  # otherwise a stream may be as long as it likes
    recorder = record_moments(model, kept or batches, settings.sinks, settings.needs_gradients, autocast=autocast)
    return fit_factors(model, recorder, settings, whole_texts(kept))


def whole_texts(batches: Sequence[Any]) -> list[Tensor]:
    """Returns the token ids of the batches that have no padding."""
    masks = [None if isinstance(batch, Tensor) else batch.get("attention_mask") for batch in batches]
    ids = [batch if isinstance(batch, Tensor) else batch["input_ids"] for batch in batches]
    return [text for text, mask in zip(ids, masks, strict=True) if mask is None or bool(mask.bool().all())]


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
