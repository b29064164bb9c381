"""Plugged layers: a weight that passes through an ordered stack of transforms each time it is read.

Plugging swaps the class of a layer in place for a subclass in which the parameter is a property: reading it gives the
transformed value, while the Parameter object, its key in the state dict and its place in the optimizer stay what they
were. The layer's own ``forward`` runs, so nothing is specific to a kind of layer, and a parent that reads
``layer.weight`` itself (``nn.MultiheadAttention``) sees the transformed weight too.

The stack is ordered by stage (structure, sparsity, quantization), whatever the order in which techniques came.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError

STAGES = ("structure", "sparsity", "quantization")
INPUT = "input"  # in the place of a parameter's name: the stack that a layer's first input passes through


class WeightTransform(nn.Module):
    """One stage of a weight's stack: a map from a weight to a weight of the same shape."""

    stage: ClassVar[str]

    def check_fold(self) -> str | None:
        """Returns why the weight can't be folded now (a decay not at its end, say), or None."""
        return None

    def plugged(self, layer: nn.Module, parameter: str) -> None:
        """Called when the transform has entered a parameter's stack: the place to hook the layer."""

    def unplugged(self, layer: nn.Module, parameter: str) -> None:
        """Called when the transform has left the stack, also on a folded copy of the layer."""

    def weight_replaced(self) -> None:
        """Told when a checkpoint that knows nothing of this transform has replaced the layer's weight."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A dense checkpoint knows nothing of transforms: it loads with strict=True and leaves them as they are.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )


class SwappedLayer:
    """Mixin of other classes that a module has for training only; folding gives it its own back."""

    own_stack: ClassVar[str]  # the submodule that came with the class

    def give_back_class(self) -> None:
        """Makes the module one of its own class again, and takes off what came with the other."""
        del self._modules[self.own_stack]  # type: ignore[attr-defined]
        self.__class__ = type(self).__bases__[1]


class PluggedLayer:
    """Mixin of every plugged class; ``isinstance(layer, PluggedLayer)`` tells a plugged layer."""

    plugged_parameters: ClassVar[tuple[str, ...]]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        if not any(f"{prefix}{parameter}" in state_dict for parameter in self._parameters):  # type: ignore[attr-defined]
            return
        for parameter in (*self.plugged_parameters, INPUT):
            stack = self._modules.get(transforms_name(parameter), {})  # type: ignore[attr-defined]
            for stage, transform in getattr(stack, "_modules", {}).items():
                own = f"{prefix}{transforms_name(parameter)}.{stage}."
                if not any(key.startswith(own) for key in state_dict):
                    transform.weight_replaced()


def transforms_name(parameter: str) -> str:
    """Returns the name of the submodule that holds the transforms of a parameter."""
    return f"{parameter}_transforms"


def is_transform_key(key: str) -> bool:
    """Tells whether a key of a state dict belongs to a transform rather than to the plain module."""
    return "_transforms." in key and any(f"_transforms.{stage}." in key for stage in STAGES)


def _plugged_property(parameter: str) -> property:
    stack_name = transforms_name(parameter)

    def read(layer: nn.Module) -> Tensor | None:
        weight = layer._parameters[parameter]
        # Under FSDP2 the parameter is a DTensor while it is sharded, and only FSDP2 itself reads it then.
        if weight is None or hasattr(weight, "_local_tensor"):
            return weight
        value: Tensor = weight
        stack: dict[str, Any] = layer._modules[stack_name]._modules  # type: ignore[union-attr]
        for stage in STAGES:
            if stage in stack:
                value = stack[stage](value)
        return value

    def write(layer: nn.Module, value: nn.Parameter) -> None:
        layer.register_parameter(parameter, value)

    return property(read, write)


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def plugged_class(cls: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    """Returns the subclass of ``cls`` in which ``parameters`` are read through their stacks, always the same one."""
    if (cls, parameters) in _CLASSES:
        return _CLASSES[cls, parameters]
    namespace: dict[str, Any] = {name: _plugged_property(name) for name in parameters}
    namespace["plugged_parameters"] = parameters
    # The class exists only here, so pickle and deepcopy rebuild it from the plain class.
    namespace["__reduce_ex__"] = lambda self, protocol: (_rebuild, (cls, parameters, vars(self).copy()))
    namespace["__module__"] = cls.__module__
    _CLASSES[cls, parameters] = type(f"Plugged{cls.__name__}", (PluggedLayer, cls), namespace)
    return _CLASSES[cls, parameters]


def _rebuild(cls: type[nn.Module], parameters: tuple[str, ...], state: dict[str, Any]) -> nn.Module:
    layer = cls.__new__(cls)
    layer.__class__ = plugged_class(cls, parameters)
    vars(layer).update(state)
    return layer


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """Returns the class the layer had before it was plugged."""
    return type(layer).__bases__[1] if isinstance(layer, PluggedLayer) else type(layer)


def latent(layer: nn.Module, parameter: str = "weight") -> nn.Parameter:
    """Returns the Parameter itself, the value before any transform."""
    value = layer._parameters[parameter]
    assert value is not None
    return value


def transform_of(layer: nn.Module, stage: str, parameter: str = "weight") -> WeightTransform | None:
    """Returns the transform at a stage of a parameter's stack, or None."""
    stack = layer._modules.get(transforms_name(parameter))
    return None if stack is None else stack._modules.get(stage)  # type: ignore[return-value]


def plug(layer: nn.Module, transform: WeightTransform, *, parameter: str = "weight", where: str = "layer") -> None:
    """Adds a transform to a parameter's stack.

    Args:
        layer: Any module that holds the parameter.
        transform: Its ``stage`` decides the place in the stack.
        parameter: Name of the parameter.
        where: Module path, for messages.

    Raises:
        LossplugError: The stage is taken, the layer has no such parameter, or the weight is sharded already.
    """
    weight = layer._parameters.get(parameter)
    if weight is None:
        raise LossplugError(f"the {type(layer).__name__} has no parameter {parameter!r}", where=where)
    if hasattr(weight, "_local_tensor"):
        raise LossplugError(
            "the weight is sharded already",
            where=where,
            remedy="Build the layers in __init__, shard in configure_model",
        )
    taken = transform_of(layer, transform.stage, parameter)
    if taken is not None:
        raise LossplugError(
            f"two techniques want the {transform.stage} stage of {parameter!r}: {type(taken).__name__} and "
            f"{type(transform).__name__}",
            where=where,
            remedy="Give each technique layers of its own",
        )
    plugged: tuple[str, ...] = type(layer).plugged_parameters if isinstance(layer, PluggedLayer) else ()
    if parameter not in plugged:
        layer.add_module(transforms_name(parameter), nn.ModuleDict())
        layer.__class__ = plugged_class(plain_class(layer), tuple(sorted((*plugged, parameter))))
    stack: Any = layer._modules[transforms_name(parameter)]
    stack[transform.stage] = transform.to(weight.device)
    transform.plugged(layer, parameter)


def plug_input(layer: nn.Module, transform: WeightTransform, *, where: str = "layer") -> None:
    """Adds a transform that the layer's first input passes through on every call of the layer.

    Args:
        layer: Any module that is called (``nn.MultiheadAttention`` reads the weight of its projection instead).
        transform: Its ``stage`` decides the place in the stack.
        where: Module path, for messages.

    Raises:
        LossplugError: The stage is taken.
    """
    taken = transform_of(layer, transform.stage, INPUT)
    if taken is not None:
        raise LossplugError(
            f"two techniques want the {transform.stage} stage of the input: {type(taken).__name__} and "
            f"{type(transform).__name__}",
            where=where,
            remedy="Give each technique layers of its own",
        )
    if transforms_name(INPUT) not in layer._modules:
        layer.add_module(transforms_name(INPUT), nn.ModuleDict())
        layer.register_forward_pre_hook(_transform_input, with_kwargs=True)
        plugged: tuple[str, ...] = type(layer).plugged_parameters if isinstance(layer, PluggedLayer) else ()
        layer.__class__ = plugged_class(plain_class(layer), plugged)
    stack: Any = layer._modules[transforms_name(INPUT)]
    weight = next(layer.parameters(), None)
    stack[transform.stage] = transform if weight is None else transform.to(weight.device)


# A function of the module, so that copies and pickles of a layer find the stack of the copy.
def _transform_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    stack: dict[str, Any] = layer._modules[transforms_name(INPUT)]._modules  # type: ignore[union-attr]
    name = "" if args else next(iter(kwargs))
    value = args[0] if args else kwargs[name]
    for stage in STAGES:
        if stage in stack:
            value = stack[stage](value)
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, name: value})


def unplug_input(layer: nn.Module, stage: str) -> None:
    """Takes a transform of the input off."""
    stack: Any = layer._modules.get(transforms_name(INPUT))
    if stack is None or stage not in stack._modules:
        return
    del stack._modules[stage]
    if stack._modules:
        return
    del layer._modules[transforms_name(INPUT)]
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _transform_input]:
        del layer._forward_pre_hooks[key]
        layer._forward_pre_hooks_with_kwargs.pop(key, None)
    rest: tuple[str, ...] = type(layer).plugged_parameters  # type: ignore[attr-defined]
    layer.__class__ = plugged_class(plain_class(layer), rest) if rest else plain_class(layer)


def unplug(layer: nn.Module, stage: str, *, parameter: str = "weight") -> None:
    """Takes a transform off without folding it: the Parameter keeps its latent value."""
    stack: Any = layer._modules.get(transforms_name(parameter))
    if stack is None or stage not in stack._modules:
        return
    removed: WeightTransform = stack._modules.pop(stage)
    if not stack._modules:
        _give_back_class(layer, parameter)
    removed.unplugged(layer, parameter)


def _give_back_class(layer: nn.Module, parameter: str) -> None:
    rest = tuple(name for name in type(layer).plugged_parameters if name != parameter)  # type: ignore[attr-defined]
    plain = plain_class(layer)
    keep = rest or transforms_name(INPUT) in layer._modules
    layer.__class__ = plugged_class(plain, rest) if keep else plain
    del layer._modules[transforms_name(parameter)]


def plugged_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the plugged layers of a model with their paths."""
    for name, layer in model.named_modules():
        if isinstance(layer, PluggedLayer):
            yield name, layer


@torch.no_grad()
def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Writes every transformed value into its Parameter and gives the layers their plain classes back.

    A transform that samples in training (a learned mask) is folded as it is in evaluation.
    Transforms of inputs and of attention have no Parameter to go into: they are taken off.

    Args:
        model: A model with plugged layers.
        inplace: Fold the model itself; by default a copy is folded and the model goes on as it was.

    Returns:
        A model of plain layers (without any plugged layer it is returned as it is, or copied).

    Raises:
        LossplugError: A transform is not at its end (the weight would not be what the technique promises).
    """
    for name, layer in plugged_layers(model):
        for parameter in type(layer).plugged_parameters:
            for transform in layer._modules[transforms_name(parameter)].children():
                reason = transform.check_fold()
                if reason is not None:
                    raise LossplugError(reason, where=f"{name}.{parameter}")
    model = model if inplace else copy.deepcopy(model)
    for _, layer in list(plugged_layers(model)):
        for parameter in type(layer).plugged_parameters:
            layer._modules[transforms_name(parameter)].eval()
            latent(layer, parameter).copy_(getattr(layer, parameter))
        for parameter in type(layer).plugged_parameters:
            for stage in STAGES:
                unplug(layer, stage, parameter=parameter)
        for stage in STAGES:
            unplug_input(layer, stage)
    for layer in list(model.modules()):
        if isinstance(layer, SwappedLayer):
            layer.give_back_class()
    return model
