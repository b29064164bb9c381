"""The pass over the layers: calibration inputs arrive, a method rounds the layer, the outputs go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import check_finite, upcast
from lightning_lossplug.quantization.observers import FakeQuant
from lightning_lossplug.quantization.post.layer import LayerProblem
from lightning_lossplug.quantization.post.lorc import LowRankError, compensate
from lightning_lossplug.quantization.post.method import PostTrainingMethod
from lightning_lossplug.quantization.post.stream import stream
from lightning_lossplug.quantization.post.tails import find_tails
from lightning_lossplug.quantization.technique import QATSettings, QATTechnique, QuantLayer
from lightning_lossplug.surgery.plug import transform_of

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """Computes a model on a batch: a mapping as keywords, a tuple or list as arguments, else as the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


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


def _bits(quantizer: Any) -> float | None:
    return None if quantizer is None else quantizer.bits


class Walk:
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
        self.factors: list[tuple[nn.Module, Any]] = []  # layers with low-rank factors, and the handles of their hooks

    @torch.no_grad()
    def undo(self, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """Makes the model what it was."""
        self.technique.detach(model)
        for layer, handle in self.factors:
            handle.remove()
            del layer._modules[LowRankError.NAME]
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])

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
            self.factors.append((problem.layer, compensate(problem, value, self.lorc_rank)))
