"""Quantising a trained model with calibration data: :func:`quantize_post_training`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import check_choice, check_finite, upcast
from lightning_lossplug.quantization.lsq import LSQ
from lightning_lossplug.quantization.observers import FakeQuant
from lightning_lossplug.quantization.post.layer import LayerProblem
from lightning_lossplug.quantization.post.lorc import compensate
from lightning_lossplug.quantization.post.method import PostTrainingMethod
from lightning_lossplug.quantization.post.stream import stream
from lightning_lossplug.quantization.post.tails import find_tails
from lightning_lossplug.quantization.technique import QATSettings, QATTechnique, QuantLayer
from lightning_lossplug.registry import registry
from lightning_lossplug.surgery.plug import transform_of
from lightning_lossplug.surgery.select import Selection, require_taken

Forward = Callable[[nn.Module, Any], Any]


@dataclass
class LayerReport:
    """What became of a layer.

    Args:
        bits_w: Bits of the weight, or None.
        bits_a: Bits of the input, or None.
        error: Relative squared error of the output on the calibration data; None without data.
        nearest_error: The same with the weight rounded to nearest.
    """

    bits_w: float | None
    bits_a: float | None
    error: float | None = None
    nearest_error: float | None = None


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


def call(model: nn.Module, batch: Any) -> Any:
    """Computes a model on a batch: a mapping as keywords, a tuple or list as arguments, else as the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


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
        technique: QATTechnique[QATSettings] = QATTechnique(settings)
        selection = technique.attach(model)
        model.eval()  # the quantisers too
        require_taken(selection, "quantize_post_training")
        result = PostTraining(model, selection)
        for layer in technique.layers.values():
            _measure_again(layer)
        if not data and (solver.needs_data or any(layer.activation for layer in technique.layers.values())):
            technique.detach(model)
            raise LossplugError("there are no calibration batches", where=solver.name, remedy="Give batches")
        before = [
            (parameter, parameter.detach().clone())
            for layer in technique.layers.values()
            for parameter in layer.candidate.layer.parameters(recurse=False)
        ]
        walk = _Walk(technique, solver, data, forward, seed, inputs, lorc_rank)
        try:
            for name, found in walk.layers(model, twin):
                result.layers[name] = found
                if report is not None:
                    report(name, found)
        except BaseException:
            technique.detach(model)
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)
            raise
    return result


def _method(method: str | PostTrainingMethod, options: dict[str, Any]) -> PostTrainingMethod:
    if isinstance(method, PostTrainingMethod):
        return method
    return registry.create("post_training", method, **options)


def _bits(quantizer: Any) -> float | None:
    return None if quantizer is None else quantizer.bits


def _measure_again(layer: QuantLayer) -> None:
    # A layer whose bits the chosen quantiser doesn't have got LSQ, whose own start is meant for training.
    for quantizer in (layer.weight, layer.activation):
        if isinstance(quantizer, LSQ):
            quantizer.init = "mse"
    if isinstance(layer.weight, LSQ):
        layer.weight.forget()
        layer.weight.initialize(layer.latent)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Walk:
    """The pass over the layers."""

    def __init__(
        self,
        technique: QATTechnique[QATSettings],
        solver: PostTrainingMethod,
        data: list[Any],
        forward: Forward,
        seed: int,
        inputs: str,
        lorc_rank: int,
    ) -> None:
        self.technique, self.solver, self.data, self.forward = technique, solver, data, forward
        self.inputs, self.lorc_rank = inputs, lorc_rank
        self.generator = torch.Generator().manual_seed(seed)
        self.tails: dict[str, tuple[nn.Module, ...]] = {}

    def layers(self, model: nn.Module, twin: nn.Module | None) -> Iterator[tuple[str, LayerReport]]:
        """Quantises layer after layer."""
        todo = dict(self.technique.layers)
        if self.data:
            # Weights that a parent reads itself (fused experts, attention projections) have no inputs of their own.
            modules = {
                name: layer.candidate.layer for name, layer in todo.items() if layer.candidate.parameter == "weight"
            }
            self.tails = find_tails(model, modules, lambda: self.forward(model, self.data[0]))
            passes = [stream(model, modules, self.data, self.forward)]
            if twin is not None:
                twins = {name: twin.get_submodule(todo[name].candidate.path) for name in modules}
                passes.append(stream(twin, twins, self.data, self.forward))
            try:
                for stops in zip(*passes, strict=True):
                    if len({name for name, _ in stops}) > 1:
                        raise LossplugError(
                            "the quantised model takes another way than the float one",
                            where=stops[0][0],
                            remedy="Use method='gptq' or 'rtn', which need no float model",
                        )
                    name = stops[0][0]
                    yield name, self._calibrated(name, todo.pop(name), [x for _, x in stops], twin)
            finally:
                for each in passes:
                    each.close()  # type: ignore[attr-defined]
        for name, layer in todo.items():
            if self.solver.needs_data or layer.activation is not None:
                raise LossplugError(
                    "no calibration batch reached it, so its scales are not known", where=name, remedy="Exclude it"
                )
            found = LayerReport(_bits(layer.weight), None)
            if layer.weight is not None:
                problem = self._problem(name, layer, layer.weight)
                self._finish(layer, problem, self.solver.solve(problem))
            yield name, found

    def _calibrated(
        self, name: str, layer: QuantLayer, stops: list[dict[int, Tensor]], twin: nn.Module | None
    ) -> LayerReport:
        raw = [x.detach() for x in stops[0].values()]
        for x in raw:
            check_finite(name, x, "calibration inputs")
        if layer.activation is not None:
            for x in raw:
                layer.activation.initialize(x)
            if isinstance(layer.activation, FakeQuant):
                layer.activation.freeze_after = layer.activation.mode[0]  # a later training run keeps the range
        found = LayerReport(_bits(layer.weight), _bits(layer.activation))
        if layer.weight is None:
            return found
        problem = self._problem(name, layer, layer.weight)
        floats = [x.detach() for x in stops[-1].values()]
        problem.inputs = floats if self.inputs == "float" else raw
        with torch.no_grad():
            problem.targets = self._targets(problem, layer, floats, twin)
            if layer.activation is not None:
                layer.activation.eval()
                problem.raw_inputs = problem.inputs
                problem.inputs = [layer.activation(x) for x in problem.inputs]
        found.nearest_error = problem.nearest_error
        value = self.solver.solve(problem)
        found.error = problem.error(value) if self.solver.needs_data else found.nearest_error
        self._finish(layer, problem, value)
        return found

    def _targets(
        self, problem: LayerProblem, layer: QuantLayer, floats: list[Tensor], twin: nn.Module | None
    ) -> list[Tensor]:
        if twin is None:
            return [problem.product(x, problem.weight) for x in floats]
        plain = twin.get_submodule(layer.candidate.path)
        made = []
        for x in floats:
            y = plain.forward(x)
            for module in problem.tail:
                y = module(y)
            made.append(y)
        return made

    def _problem(self, name: str, layer: QuantLayer, weight: Quantizer) -> LayerProblem:
        candidate = layer.candidate
        value: Tensor = upcast(layer.latent.detach().clone())  # the latent is overwritten at the end
        for stage in ("structure", "sparsity"):
            transform = transform_of(candidate.layer, stage, candidate.parameter)
            value = value if transform is None else transform(value).detach()
        return LayerProblem(
            name,
            candidate.layer,
            candidate.parameter,
            candidate.output_axis,
            value,
            weight,
            tail=self.tails.get(name, ()),
            activation=layer.activation,
            generator=self.generator,
        )

    @torch.no_grad()
    def _finish(self, layer: QuantLayer, problem: LayerProblem, value: Tensor) -> None:
        check_finite(problem.name, value, "quantised weights")
        if problem.quantizer.has_codes:
            layer.latent.copy_(value)
        if self.lorc_rank and problem.weight.ndim == 2:
            compensate(problem, value, self.lorc_rank)
