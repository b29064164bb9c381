"""Outliers of inputs moved into weights: scales and shifts per channel, folded into a norm and the layers behind it.

The float model computes the same; what changes is how well its inputs and weights can be quantised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_finite
from lightning_lossplug.quantization.post.walk import call
from lightning_lossplug.registry import registry
from lightning_lossplug.surgery.modes import evaluating
from lightning_lossplug.surgery.permute import unchanged
from lightning_lossplug.surgery.plug import PluggedLayer, plain_class
from lightning_lossplug.surgery.select import layer_kinds


@dataclass
class Group:
    """A norm and the linear layers that read its output.

    Args:
        name: Path of the norm.
        norm: The norm.
        linears: The layers by path.
        inputs: Outputs of the norm for the calibration batches, ``[tokens, channels]``.
    """

    name: str
    norm: Any
    linears: dict[str, Any] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)

    def weights(self) -> list[Tensor]:
        """Returns the weights as ``[out, channels]``."""
        return [_rows(layer).detach().float() for layer in self.linears.values()]

    @property
    def can_shift(self) -> bool:
        """Whether the norm and all linears have biases, which a shift folds into."""
        return all(getattr(m, "bias", None) is not None for m in (self.norm, *self.linears.values()))


class Migration(ABC):
    """Chooses the scales (and shifts) of one group's channels."""

    name: ClassVar[str]

    @abstractmethod
    def solve(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """Returns the divisors of the channels, and what is subtracted from them before (or None)."""


def migrate_outliers(
    model: nn.Module,
    batches: Iterable[Any],
    method: str | Migration = "smoothquant",
    *,
    forward: Callable[[nn.Module, Any], Any] = call,
    **options: Any,
) -> dict[str, Tensor]:
    """Moves per-channel outliers between norms and the linear layers behind them, in place; the function stays.

    Norms are LayerNorm and RMSNorm modules whose output tensor is what the linear layers are called with. That nothing
    else reads it is checked by computing the first batch before and after.

    Args:
        model: A float model, before it is quantised.
        batches: Calibration batches, without padding.
        method: ``smoothquant``, ``awq``, ``os_plus`` or an object.
        forward: Computes the model on a batch.
        **options: Parameters of the method.

    Returns:
        ``{norm: divisors}``.

    Raises:
        LossplugError: No such group, NaN or infinite inputs, a model that isn't float any more or whose function
            would change.
    """
    solver = method if isinstance(method, Migration) else registry.create("post_training", method, **options)
    if not isinstance(solver, Migration):
        raise LossplugError(f"{method!r} moves no outliers", remedy="Use smoothquant, awq or os_plus")
    if any(isinstance(module, PluggedLayer) for module in model.modules()):
        raise LossplugError("the model is quantised already", where=solver.name, remedy="Move outliers first")
    data = list(batches)
    if not data:
        raise LossplugError("there are no calibration batches", where=solver.name, remedy="Give batches")
    with evaluating(model), torch.no_grad():
        groups = find_groups(model, data, forward)
        if not groups:
            raise LossplugError("no norm feeds linear layers alone", where=solver.name)
        saved = [(p, p.detach().clone()) for g in groups for m in (g.norm, *g.linears.values()) for p in m.parameters()]
        before = forward(model, data[0])
        found = {}
        for group in groups:
            scale, shift = solver.solve(group)
            fold_scales(group, scale, shift)
            found[group.name] = scale
            group.inputs.clear()
        if not unchanged(before, forward(model, data[0])):
            for parameter, value in saved:
                parameter.copy_(value)
            raise LossplugError(
                "the model would compute something else, so more reads its norms than their linear layers",
                where=solver.name,
                remedy="Quantise it without moving outliers",
            )
    return found


def is_norm(module: nn.Module) -> bool:
    """Tells LayerNorm and RMSNorm modules, of whatever library, with a weight per channel."""
    weight = getattr(module, "weight", None)
    name = type(module).__name__
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and ("LayerNorm" in name or "RMSNorm" in name)


def find_groups(model: nn.Module, batches: list[Any], forward: Callable[[nn.Module, Any], Any]) -> list[Group]:
    """Returns the norms whose output linear layers read, with that output for every batch."""
    groups = {id(m): Group(name, m) for name, m in model.named_modules() if is_norm(m)}
    paths = {id(m): name for name, m in model.named_modules() if _is_linear(m)}
    last: dict[int, tuple[Tensor, Group]] = {}

    def after(norm: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            group = groups[id(norm)]
            check_finite(group.name, output, "calibration inputs")
            group.inputs.append(output.detach().reshape(-1, output.shape[-1]).float())
            last[id(norm)] = (output, group)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        for output, group in last.values():
            if x is output:
                group.linears.setdefault(paths[id(layer)], layer)

    handles = [m.register_forward_hook(after) for m in model.modules() if id(m) in groups]
    handles += [m.register_forward_pre_hook(before, with_kwargs=True) for m in model.modules() if id(m) in paths]
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [group for group in groups.values() if group.linears]


def _is_linear(module: nn.Module) -> bool:
    kinds = layer_kinds(module)
    linear = isinstance(module, nn.Linear) or plain_class(module).__name__ == "Conv1D"
    return linear and len(kinds) == 1 and kinds[0].reduction_axis is not None


def _rows(layer: Any) -> Tensor:
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


def fold_scales(group: Group, scale: Tensor, shift: Tensor | None = None) -> None:
    """Divides the norm's output by ``scale`` after subtracting ``shift``, and makes the linear layers undo both.

    Raises:
        LossplugError: A shift where some bias is missing.
    """
    norm = group.norm
    if shift is not None and not group.can_shift:
        raise LossplugError("a shift needs biases in the norm and its linear layers", where=group.name)
    for layer in group.linears.values():
        weight = _rows(layer)
        if shift is not None:
            layer.bias += (weight.double() @ shift.double().to(weight.device)).to(layer.bias)
        weight.mul_(scale.to(weight))
    norm.weight.div_(scale.to(norm.weight))
    if getattr(norm, "bias", None) is not None:
        if shift is not None:
            norm.bias.sub_(shift.to(norm.bias))
        norm.bias.div_(scale.to(norm.bias))
