"""Quantising a trained model with calibration data: :func:`quantize_post_training`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_choice
from lightning_lossplug.quantization.lsq import LSQ
from lightning_lossplug.quantization.post.method import PostTrainingMethod
from lightning_lossplug.quantization.post.walk import Forward, LayerReport, Walk, call
from lightning_lossplug.quantization.technique import QATSettings, QATTechnique, QuantLayer
from lightning_lossplug.registry import registry
from lightning_lossplug.surgery.modes import evaluating
from lightning_lossplug.surgery.select import Selection, require_taken


@dataclass
class PostTraining:
    """The result of :func:`quantize_post_training`.

    Args:
        model: The model, its layers plugged.
        selection: Which weights were taken and why others were left.
        layers: A report per layer.
    """

    model: nn.Module
    selection: Selection
    layers: dict[str, LayerReport] = field(default_factory=dict)


def quantize_post_training(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    method: str | PostTrainingMethod = "adaround",
    bits_w: float | None = 4,
    bits_a: int | None = None,
    *,
    method_options: Mapping[str, Any] | None = None,
    granularity: str = "channel",
    group_size: int | None = None,
    include: list[str] | dict[str, str] | None = None,
    exclude: Sequence[str] = (),
    first_last_bits: int | None = 8,
    weight: str = "affine",
    weight_options: Mapping[str, Any] | None = None,
    activation: str = "fake_quant",
    activation_options: Mapping[str, Any] | None = None,
    inputs: Literal["quantized", "float"] = "quantized",
    lorc_rank: int = 0,
    seed: int = 0,
    forward: Forward = call,
    report: Callable[[str, LayerReport], None] | None = None,
) -> PostTraining:
    """Quantises a trained model in place, layer by layer in the order of its computation, without training it.

    Every layer is rounded by ``method`` when the calibration inputs have reached it through the layers before, which
    are quantised already: one pass over the data, however deep the model. Steps of inputs are set on the way. The
    result is plugged like a QAT model, with fixed grids: ``save_packed``, ``integer_model``, ``fold`` and the exports
    take it. Weights then hold their rounded values.

    Args:
        model: Any module; put in eval mode for the pass, in one dtype, on one device.
        batches: Calibration batches in the form of the model's arguments (see :func:`call`), all held in memory;
            None is enough for ``rtn`` with float inputs.
        method: Registry name (``lossplug list post_training``) or an object.
        bits_w: Bits of the weights, 2 to 8.
        bits_a: Bits of each layer's input, 2 to 8; None leaves it in float.
        method_options: Parameters of the method, by the names on its card.
        granularity: ``tensor``, ``channel`` or ``group``: what shares a step.
        group_size: Weights per group, for ``group``.
        include: Layers by glob pattern, or a mapping of patterns to bits (``{"*.mlp.*": "w4a8"}``).
        exclude: Patterns that are left out.
        first_last_bits: Bits of the first convolution and the output layer; None leaves them in float.
        weight: Quantiser of the weights; methods other than ``rtn`` need ``affine``.
        weight_options: Its further parameters.
        activation: Quantiser of the inputs.
        activation_options: Its further parameters.
        inputs: Reconstruct from the inputs of the ``quantized`` model or of the ``float`` one.
        lorc_rank: Add low-rank factors of the rounding error to every linear layer (see :func:`lorc`); 0 is none.
        seed: Of the method's random numbers.
        forward: Computes the model on a batch.
        report: Told of every finished layer.

    Raises:
        LossplugError: Settings out of range, nothing selected, no calibration batch, a layer that none of them
            reaches, or NaN or infinite values on the way, with the layer's name. The model is then as it was.
    """
    solver = _method(method, dict(method_options or {}))
    check_choice("quantize_post_training", "inputs", inputs, ("quantized", "float"))
    settings = QATSettings(
        bits_w=bits_w,
        bits_a=bits_a,
        weight=weight,
        activation=activation,
        granularity=granularity,
        group_size=group_size,
        include=include,
        exclude=list(exclude),
        first_last_bits=first_last_bits,
        weight_options=dict(weight_options or {}),
        activation_options=dict(activation_options or {}),
    )
    data = list(batches or ())
    with evaluating(model):
        use_float = solver.needs_float_model or inputs == "float"
        twin = copy.deepcopy(model) if use_float and data else None
        saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        technique: QATTechnique[QATSettings] = QATTechnique(settings)
        walk = Walk(technique, solver, data, forward, seed, inputs, lorc_rank)
        try:
            selection = technique.attach(model)
            model.eval()  # the quantisers too
            require_taken(selection, "quantize_post_training")
            result = PostTraining(model, selection)
            for layer in technique.layers.values():
                _measure_again(layer)
            if not data and (solver.needs_data or any(layer.activation for layer in technique.layers.values())):
                raise LossplugError("there are no calibration batches", where=solver.name, remedy="Give batches")
            for name, found in walk.layers(model, twin):
                result.layers[name] = found
                if report is not None:
                    report(name, found)
        except BaseException:
            walk.undo(model, saved)
            raise
    return result


def _method(method: str | PostTrainingMethod, options: dict[str, Any]) -> PostTrainingMethod:
    if isinstance(method, PostTrainingMethod):
        return method
    return registry.create("post_training", method, **options)


def _measure_again(layer: QuantLayer) -> None:
    # A layer whose bits the chosen quantiser doesn't have got LSQ, whose own start is meant for training.
    for quantizer in (layer.weight, layer.activation):
        if isinstance(quantizer, LSQ):
            quantizer.init = "mse"
    if isinstance(layer.weight, LSQ):
        layer.weight.forget()
        layer.weight.initialize(layer.latent)
