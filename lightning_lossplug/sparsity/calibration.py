"""A loop over calibration data that lets scores see inputs and gradients before, or without, training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.sparsity.signals import Watched, merge_inputs


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Calls ``model(**batch)`` for a mapping, ``model(batch[0])`` for a sequence, otherwise ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, Sequence) else batch)


def calibrate(
    model: nn.Module,
    watched: Mapping[nn.Parameter, Watched],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    where: str = "calibration",
) -> None:
    """Runs batches through a model in evaluation mode; every batch counts alike.

    Parameters and buffers other than the signals' stay as they are. Under a process group every rank has to run the
    same number of batches, of its own data.

    Args:
        model: The model.
        watched: Weight -> its transform.
        batches: Calibration data, on the model's device.
        forward: ``forward(model, batch)``; by default :func:`run_batch`. For a score that needs gradients it returns
            the loss, or an output with ``.loss``.
        where: For messages.

    Raises:
        LossplugError: No batch, no loss where gradients are needed, or a layer that no batch reached.
    """
    transforms = list(watched.values())
    gradients = any("grad_norm" in t.watched for t in transforms)
    modes = [(module, module.training) for module in model.modules()]
    gathering = [t.gathering for t in transforms]
    model.eval()
    for transform in transforms:
        transform.reset_signals()
        transform.gathering = transform.calibrating = True
    try:
        for batch in batches:
            with torch.set_grad_enabled(gradients):
                output = (forward or run_batch)(model, batch)
            if gradients:
                _see_gradients(output, watched, where)
            merge_inputs(transforms, ema=1.0)
    finally:
        for module, training in modes:
            module.training = training
        for transform, before in zip(transforms, gathering, strict=True):
            transform.gathering, transform.calibrating = before, False
    if not transforms or any(t.steps_seen() == 0 for t in transforms):
        raise LossplugError(
            "a selected layer saw no data",
            where=where,
            remedy="Give batches that go through every selected layer, or exclude those that they don't reach",
        )


def _see_gradients(output: Any, watched: Mapping[nn.Parameter, Watched], where: str) -> None:
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        raise LossplugError(
            "the score needs gradients, and no loss came back",
            where=where,
            remedy="Give forward, a function of model and batch that returns the loss",
        )
    grads = torch.autograd.grad(loss, list(watched), allow_unused=True)
    for transform, grad in zip(watched.values(), grads, strict=True):
        if grad is not None:
            transform.see_gradient(grad, ema=1.0)
