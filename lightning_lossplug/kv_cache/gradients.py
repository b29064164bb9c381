"""What an error of a key or value costs in loss: second moments of their gradients, from backward passes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import (
    AttentionBlock,
    Tap,
    block_input,
    counted_tokens,
    join_heads,
    rotary_tables,
)
from lightning_lossplug.kv_cache.moments import Moments


def gradient_moments(
    model: nn.Module, blocks: dict[int, AttentionBlock], inputs: dict[str, Tensor], sinks: int
) -> dict[int, tuple[Moments, Moments]]:
    r"""Runs a language model forward and backward and returns moments of the gradients of keys and values, by layer.

    With :math:`g_t` the gradient of the summed loss with respect to the unrotated key (or the value) of token t and
    small errors :math:`\delta_t`, the loss rises by about :math:`\tfrac12 \sum_t (g_t^\top \delta_t)^2` (the Fisher
    information in place of the Hessian), so :math:`E[g g^\top]` is the metric in which errors of all layers compare.
    Weights get no gradient.

    Args:
        model: A causal language model that takes ``labels``, or a module that holds one.
        blocks: Its attention blocks.
        inputs: ``input_ids`` and perhaps ``attention_mask``.
        sinks: First tokens of every row that are left out.

    Raises:
        LossplugError: No module computes a loss.
    """
    causal = language_model(model, blocks)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: dict[int, tuple[Moments, Moments]] = {}
    handles = []
    labels = inputs["input_ids"]
    if "attention_mask" in inputs:
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for block in blocks.values():
            hook = _hook(block, sinks, found)
            handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.enable_grad():
            loss = causal(**inputs, labels=labels, use_cache=False).loss
            (loss * (labels[:, 1:] != -100).sum()).backward()  # of the sum, so that batches of any size add up
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return found


def _hook(block: AttentionBlock, sinks: int, found: dict[int, tuple[Moments, Moments]]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cos, sin = (table.detach().float() for table in rotary_tables(block, kwargs))
        batch, tokens = block_input(args, kwargs).shape[:2]
        valid = counted_tokens(kwargs.get("attention_mask"), batch, tokens, sinks, cos.device)

        def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            pair = (Moments(keys.shape[1] * keys.shape[3]), Moments(values.shape[1] * values.shape[3]))
            found[block.index] = pair

            def back_keys(gradient: Tensor) -> None:
                # the transpose of the rotation, which is its inverse but for the scale of the tables
                pair[0].update(join_heads(block.rotary.rotate(gradient.float(), cos, -sin)), valid)

            def back_values(gradient: Tensor) -> None:
                pair[1].update(join_heads(gradient), valid)

            # the first layer's need no gradient of themselves, since the weights get none
            keys, values = (t if t.requires_grad else t.detach().requires_grad_() for t in (keys, values))
            keys.register_hook(back_keys)
            values.register_hook(back_values)
            return keys, values

        return args, {**kwargs, block.cache: Tap(see, kwargs.get(block.cache))}

    return hook


def language_model(model: nn.Module, blocks: dict[int, AttentionBlock]) -> nn.Module:
    """Returns the innermost module with a loss of its own that holds all blocks, inside a LightningModule say.

    Raises:
        LossplugError: There is none.
    """
    found = None
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        names = inspect.signature(module.forward).parameters
        if {"input_ids", "labels"} <= set(names) and all(block.path.startswith(prefix) for block in blocks.values()):
            found = module
    if found is None:
        raise LossplugError(
            f"{type(model).__name__} computes no loss from input_ids and labels",
            where="calibration",
            remedy="Give a causal language model of transformers, or settings that need no gradients",
        )
    return found
