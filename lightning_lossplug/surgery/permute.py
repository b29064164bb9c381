"""Reordering the inputs of a layer without changing the network: the same order goes into the layers that feed it.

Between a producer and its consumer only what treats every channel alike may stand. Pairs are found by the names that
timm, transformers and torch give to such layers, and in ``nn.Sequential`` by the kinds of the modules between. Names
can deceive, so :func:`unchanged` compares the network's output before and after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.surgery.select import layer_kinds

# Layers of one MLP: names of what feeds, name of what is fed.
MLP_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("fc1_g", "fc1_x"), "fc2"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("w1", "w3"), "w2"),
    (("lin1",), "lin2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
# The same inside modules that hold other layers too.
BLOCK_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("linear1",), "linear2"),
    (("intermediate.dense",), "output.dense"),
)
RESIDUAL_BLOCKS = ("BasicBlock", "Bottleneck")

_CHANNELWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Tanh, nn.Sigmoid),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
)
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Side:
    """One parameter of a link: the layer, the parameter, and the axis that is reordered.

    Args:
        layer: Layer that holds it.
        parameter: Its name.
        axis: The axis of the shared channels.
        copies: How often the channels follow each other on it (2: a fused gate and up projection).
    """

    layer: nn.Module
    parameter: str
    axis: int
    copies: int = 1

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        value = self.layer._parameters[self.parameter]
        assert value is not None
        return value

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Takes the channels in a new order; a producer's bias goes along."""
        order = order.to(self.weight.device)
        index = torch.cat([order + copy * len(order) for copy in range(self.copies)])
        self.weight.copy_(self.weight.index_select(self.axis, index))


@dataclass(frozen=True)
class Link:
    """Layers whose outputs are the inputs of one other, and what stands between.

    Args:
        name: Path of the consumer.
        consumer: Its weight, along the inputs.
        producers: Weights and biases of the layers that feed it, along the outputs.
        between: Norms in between, whose vectors are per channel.
    """

    name: str
    consumer: Side
    producers: tuple[Side, ...]
    between: tuple[nn.Module, ...] = ()

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.consumer.weight.shape[self.consumer.axis]

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Reorders the channels everywhere, in place; the network computes the same."""
        for side in (self.consumer, *self.producers):
            side.reorder(order)
        for norm in self.between:
            for value in (*norm.parameters(recurse=False), *norm.buffers(recurse=False)):
                if value.shape == (self.width,):
                    value.copy_(value[order.to(value.device)])


def find_links(model: nn.Module) -> list[Link]:
    """Returns the links of a model, in its order; each consumer once."""
    found: dict[int, Link] = {}
    for path, module in model.named_modules():
        for finder in (_experts, _named, _blocks, _sequential):
            for link in finder(path, module):
                found.setdefault(id(link.consumer.weight), link)
    return list(found.values())


def _axes(layer: nn.Module) -> tuple[int, int] | None:
    """Returns the reduction and the output axis of a plain product."""
    kinds = layer_kinds(layer)
    if len(kinds) != 1 or kinds[0].parameter != "weight" or kinds[0].reduction_axis is None:
        return None
    if getattr(layer, "groups", 1) != 1:
        return None
    return kinds[0].reduction_axis, kinds[0].output_axis


def _link(path: str, producers: list[nn.Module], consumer: nn.Module, between: tuple[nn.Module, ...]) -> Link | None:
    """Builds a link, or returns None where the widths don't fit."""
    into = _axes(consumer)
    if into is None:
        return None
    fed = Side(consumer, "weight", into[0])
    width, sides = fed.weight.shape[into[0]], []
    for producer in producers:
        axes = _axes(producer)
        if axes is None:
            return None
        out = producer._parameters["weight"].shape[axes[1]]  # type: ignore[union-attr]
        if out not in (width, 2 * width) or (out != width and len(producers) > 1):
            return None
        sides.append(Side(producer, "weight", axes[1], out // width))
        if producer._parameters.get("bias") is not None:
            sides.append(Side(producer, "bias", 0, out // width))
    return Link(path, fed, tuple(sides), between)


def _get(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _named(path: str, module: nn.Module) -> Iterator[Link]:
    for names, last in (*MLP_NAMES, *BLOCK_NAMES):
        layers = [_get(module, name) for name in (*names, last)]
        if any(layer is None for layer in layers):
            continue
        *producers, consumer = layers
        link = _link(f"{path}.{last}".lstrip("."), producers, consumer, ())  # type: ignore[arg-type]
        if link is None:
            continue
        if (names, last) in BLOCK_NAMES:
            yield link
            return
        rest = [child for child in module.children() if child not in layers and _holds_tensors(child)]
        if all(_per_channel(child, link.width) for child in rest):
            yield Link(link.name, link.consumer, link.producers, tuple(rest))
        return


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def _per_channel(module: nn.Module, width: int) -> bool:
    """Whether every tensor of a module between two layers is one number, or one per channel."""
    tensors = (*module.parameters(), *module.buffers())
    return not list(module.children()) and all(t.numel() == 1 or t.shape == (width,) for t in tensors)


def _experts(path: str, module: nn.Module) -> Iterator[Link]:
    kinds = {kind.parameter: kind for kind in layer_kinds(module)}
    down = kinds.get("down_proj")
    # Where gate and up channels alternate (gpt-oss), they are not two copies after each other.
    if down is None or down.reduction_axis is None or not getattr(module, "is_concatenated", True):
        return
    consumer = Side(module, "down_proj", down.reduction_axis)
    width = consumer.weight.shape[down.reduction_axis]
    sides = []
    for name in sorted(set(kinds) - {"down_proj"}):
        weight = module._parameters[name]
        assert weight is not None
        sides.append(Side(module, name, kinds[name].output_axis, weight.shape[kinds[name].output_axis] // width))
        if module._parameters.get(f"{name}_bias") is not None:
            sides.append(Side(module, f"{name}_bias", 1, sides[-1].copies))
    yield Link(f"{path}.down_proj".lstrip("."), consumer, tuple(sides))


def _blocks(path: str, module: nn.Module) -> Iterator[Link]:
    if type(module).__name__ not in RESIDUAL_BLOCKS:
        return
    for k in (1, 2):
        layers: list[Any] = [_get(module, name) for name in (f"conv{k}", f"bn{k}", f"conv{k + 1}")]
        if all(layer is not None for layer in layers) and not any(_squeeze(module, k)):
            link = _link(f"{path}.conv{k + 1}".lstrip("."), [layers[0]], layers[2], (layers[1],))
            if link is not None and _norm_fits(layers[1], link.width):
                yield link


def _squeeze(module: nn.Module, k: int) -> Iterator[bool]:
    """Whether the block has more layers with weights at this place than its names say."""
    for name in (f"drop_block{k}", "drop_block", f"act{k}", "aa"):
        child = _get(module, name)
        yield child is not None and any(True for _ in child.parameters())


def _norm_fits(norm: nn.Module, width: int) -> bool:
    tensors = (*norm.parameters(), *norm.buffers())
    return all(t.numel() == 1 or t.shape == (width,) for t in tensors)


def _sequential(path: str, module: nn.Module) -> Iterator[Link]:
    if type(module) is not nn.Sequential:
        return
    producer: nn.Module | None = None
    between: list[nn.Module] = []
    for name, child in module.named_children():
        if isinstance(child, _PRODUCTS):
            if producer is not None:
                link = _link(f"{path}.{name}".lstrip("."), [producer], child, tuple(between))
                if link is not None and all(side.copies == 1 for side in link.producers):
                    yield link
            producer, between = child, []
        elif isinstance(child, _CHANNELWISE) or (isinstance(child, nn.LayerNorm) and isinstance(producer, nn.Linear)):
            between.append(child)
        else:
            producer, between = None, []


def unchanged(before: Any, after: Any) -> bool:
    """Tells whether two outputs of a network (tensors, or containers of them) are equal up to rounding."""
    if isinstance(before, Tensor):
        if not before.is_floating_point() or not before.numel():
            return True
        bound = {torch.float64: 1e-9, torch.float32: 1e-3}.get(before.dtype, 0.1)
        scale = float(before.abs().max())
        return float((before - after).abs().max()) <= bound * max(scale, torch.finfo(before.dtype).tiny)
    if isinstance(before, dict):
        return all(unchanged(before[key], after[key]) for key in before)
    if isinstance(before, (tuple, list)):
        return all(unchanged(a, b) for a, b in zip(before, after, strict=True))
    return True
