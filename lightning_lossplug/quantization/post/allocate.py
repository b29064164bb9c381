"""Bits per layer by integer programming: the least loss under a size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.quantization.grid import check_bits, check_range
from lightning_lossplug.quantization.post.run import quantize_post_training
from lightning_lossplug.quantization.post.walk import call
from lightning_lossplug.surgery.plug import latent, plugged_layers, unplug, unplug_input


def bit_alloc_ip(
    degradation: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], target: float, base: int = 32
) -> dict[str, int]:
    r"""Returns the bits of every layer with the least sum of degradations whose size is at most ``target`` of base.

    :math:`\min \sum z_{lc}\,d_{lc}` with binary z, :math:`\sum_c z_{lc} = 1` and
    :math:`\sum z_{lc}\,n_l\,b_c \le target \cdot base \cdot \sum n_l`.

    Args:
        degradation: ``{layer: {bits: loss}}``: what is lost when only this layer has these bits.
        sizes: Weights per layer.
        target: Size over that of ``base`` bits everywhere, in (0, 1].
        base: Bits that ``target`` refers to; 32 is the float model.

    Raises:
        LossplugError: A target below what the smallest choice reaches (which it names), or a value that isn't finite.

    Source: Hubara et al., Improving Post Training Neural Quantization, arXiv 2006.10518.
    """
    if not 0 < target <= 1:
        raise LossplugError(f"target is {target}, allowed is (0, 1]", where="bit_alloc_ip")
    choices = [(layer, bits) for layer, row in degradation.items() for bits in row]
    costs = [float(degradation[layer][bits]) for layer, bits in choices]
    if not torch.tensor(costs).isfinite().all():
        raise LossplugError("a degradation is NaN or infinite", where="bit_alloc_ip")
    total = sum(sizes[layer] for layer in degradation)
    budget = target * base * total
    least = sum(sizes[layer] * min(row) for layer, row in degradation.items())
    if not choices or least > budget * (1 + 1e-9):
        raise LossplugError(
            f"target is {target:g}, the fewest bits everywhere take {least / (base * max(total, 1)):.4g}",
            where="bit_alloc_ip",
            remedy="Raise the target, or allow fewer bits",
        )
    optimize = require("scipy.optimize", "ptq", "bit_alloc_ip")
    numpy = require("numpy", "ptq", "bit_alloc_ip")
    one = numpy.array([[float(layer == other) for other, _ in choices] for layer in degradation])
    use = numpy.array([[sizes[layer] * bits / total for layer, bits in choices]])
    solved = optimize.milp(
        c=numpy.array(costs),
        integrality=numpy.ones(len(choices)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one, 1, 1),
            optimize.LinearConstraint(use, -numpy.inf, budget / total * (1 + 1e-9)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if not solved.success:
        raise LossplugError(f"the solver found no allocation ({solved.message})", where="bit_alloc_ip")
    return {layer: bits for (layer, bits), z in zip(choices, solved.x, strict=True) if z > 0.5}


def measure_degradation(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], float],
    bits: Sequence[int] = (4, 8),
    *,
    forward: Callable[[nn.Module, Any], Any] = call,
    **options: Any,
) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    """Measures what each layer alone costs at each number of bits, floored at 1e-6.

    Args:
        model: A float model; it is as it was afterwards.
        batches: Calibration batches, also what the loss is summed over.
        loss: Of a model on a batch, as a number (cross-entropy, or ``1 - accuracy``).
        bits: The choices.
        forward: Computes the model on a batch.
        **options: Further arguments of :func:`quantize_post_training`, whose method is ``rtn`` unless given.

    Returns:
        ``{layer: {bits: degradation}}`` and ``{layer: weights}``, for :func:`bit_alloc_ip`.

    Raises:
        LossplugError: As :func:`quantize_post_training`.
    """
    data = list(batches)
    for choice in bits:
        check_bits("measure_degradation", choice, 2, 8)
    options = {"method": "rtn", "first_last_bits": None, **options}

    def total() -> float:
        modes = model.training
        model.eval()
        with torch.no_grad():
            value = sum(float(loss(model, batch)) for batch in data) / max(len(data), 1)
        model.train(modes)
        return value

    before = total()
    degradation: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    for choice in bits:
        result = quantize_post_training(model, data, bits_w=choice, forward=forward, **options)
        rounded = {c.name: latent(c.layer, c.parameter).detach().clone() for c in result.selection.taken}
        for _, layer in list(plugged_layers(model)):
            for parameter in type(layer).plugged_parameters:
                unplug(layer, "quantization", parameter=parameter)
            unplug_input(layer, "quantization")
        _restore(model, saved)
        for candidate in result.selection.taken:
            weight = latent(candidate.layer, candidate.parameter)
            own = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(rounded[candidate.name])
                degradation.setdefault(candidate.name, {})[choice] = max(total() - before, 1e-6)
                weight.copy_(own)
            sizes[candidate.name] = weight.numel()
    return degradation, sizes


def _restore(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in saved:
                parameter.copy_(saved[name])


def allocate_bits(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], float],
    target: float,
    bits: Sequence[int] = (4, 8),
    **options: Any,
) -> dict[str, str]:
    """Returns the ``include`` of :func:`quantize_post_training` (or QAT) with the least loss under a size.

    Args:
        model: A float model.
        batches: Calibration batches.
        loss: Of a model on a batch, as a number.
        target: Size of the chosen layers over their size in float32, in (0, 1]: 0.15 is 4.8 bits on average.
        bits: The choices.
        **options: Further arguments of :func:`measure_degradation`.

    Raises:
        LossplugError: A target that can't be reached, and as :func:`quantize_post_training`.
    """
    check_range("allocate_bits", "target", target, 0, 1)
    degradation, sizes = measure_degradation(model, batches, loss, bits, **options)
    return {layer: f"w{chosen}" for layer, chosen in bit_alloc_ip(degradation, sizes, target).items()}
