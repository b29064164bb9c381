"""Models in integers: every trained layer that can be becomes an :class:`IntegerLayer`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.attention import AttentionQuant
from lightning_lossplug.quantization.attention_bytes import integer_attention
from lightning_lossplug.quantization.attention_floats import replace_attentions
from lightning_lossplug.quantization.base import Codes, Quantizer
from lightning_lossplug.quantization.dynamic import Dynamic
from lightning_lossplug.quantization.fold_scale import fold_layer_scales
from lightning_lossplug.quantization.gated_layer import fuse_gates
from lightning_lossplug.quantization.integer_fuse import fuse_layers
from lightning_lossplug.quantization.integer_layer import Backend, IntegerLayer
from lightning_lossplug.quantization.norm_rows import replace_norms
from lightning_lossplug.quantization.recorded import record_modules
from lightning_lossplug.quantization.transform import QuantTransform
from lightning_lossplug.surgery.attention import attending_layers, attention_of, replace_attention
from lightning_lossplug.surgery.fold_norm import fold_batch_norm
from lightning_lossplug.surgery.plug import INPUT, latent, plain_class, plugged_layers, transform_of

SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels"),
    *("kernel_size", "stride", "padding", "dilation", "groups"),
)


def quantizer_of(layer: nn.Module, parameter: str = "weight") -> Quantizer | None:
    """Returns the quantiser of a weight (or, with :data:`surgery.INPUT`, of the input), or None."""
    transform = transform_of(layer, "quantization", parameter)
    return transform.quantizer if isinstance(transform, QuantTransform) else None


def integer_layer(layer: nn.Module, where: str = "layer", backend: Backend = "auto") -> IntegerLayer | str:
    """Returns a plugged layer in integers, or why it has to stay in float.

    Args:
        layer: A plugged ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d`` with quantised weight and input.
        where: Its path, for messages.
        backend: ``auto``, ``native``, ``onednn`` or ``reference``; see :meth:`IntegerLayer.use`.

    Raises:
        LossplugError: Scales that were never set or are not above 0; a backend that can't compute the layer.
    """
    kind = plain_class(layer)
    weight, inputs = quantizer_of(layer), quantizer_of(layer, INPUT)
    if not issubclass(kind, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return f"{kind.__name__} has no integer form"
    if weight is None or inputs is None:
        return "its weight or input is not quantised"
    if weight.layout.group_size:
        return "its weights have groups, which the int8 product can't scale"
    if getattr(layer, "padding_mode", "zeros") != "zeros" or isinstance(getattr(layer, "padding", 0), str):
        return "its padding is not a number of zeros"
    for quantizer in (weight, inputs):
        quantizer.check_ready()
        if not quantizer.has_codes:
            return f"{quantizer.name} has no integer codes"
    measured = isinstance(inputs, Dynamic)
    step, zero = inputs.grid(latent(layer).new_zeros(1))
    coded = weight_codes(layer, weight)
    if coded.zero_point is not None and bool((coded.zero_point != 0).any()):
        return "its weights have a zero-point"
    if int(coded.codes.min()) < -128 or int(coded.codes.max()) > 127:
        return "its weight codes are wider than int8"
    point = 0 if zero is None else int(zero)
    low, high = input_bounds(inputs)
    if high - low > 255:
        return "its input codes are wider than a byte"
    convolution = None
    if not issubclass(kind, nn.Linear):
        names = ("stride", "padding", "dilation", "groups")
        convolution = {n: v if isinstance(v := getattr(layer, n), int) else list(v) for n in names}
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    made = IntegerLayer(coded.codes, coded.scale, bias, (low, high), step, point, convolution, measured)
    for attribute in SIZES:  # which the forward around it may read
        if hasattr(layer, attribute):
            setattr(made, attribute, getattr(layer, attribute))
    if not made.use(backend):
        raise LossplugError(f"the {backend} kernel can't compute this layer here", where=where, remedy="Use 'auto'")
    return made


@torch.no_grad()
def weight_codes(layer: nn.Module, weight: Quantizer, parameter: str = "weight") -> Codes:
    """Returns the codes of a plugged weight, after the stages before quantisation."""
    value: Tensor = latent(layer, parameter).detach()
    for stage in ("structure", "sparsity"):
        transform = transform_of(layer, stage, parameter)
        value = value if transform is None else transform(value)
    return weight.quantize(value)


def input_bounds(quantizer: Quantizer) -> tuple[int, int]:
    """Returns the least and the largest code of an input's quantiser."""
    bounds = getattr(quantizer, "bounds", None)
    if bounds is not None:
        return bounds
    lo, hi = (quantizer.quantize(torch.tensor([end])).codes.item() for end in (-1e30, 1e30))
    return int(lo), int(hi)


def integer_model(
    model: nn.Module, *, backend: Backend = "auto", fuse: bool = True
) -> tuple[nn.Module, dict[str, str]]:
    """Returns a copy of a QAT model with its quantised layers in integers.

    The copy is in eval mode, has no gradients, and computes what the QAT model computes in eval mode: each layer up to
    float32 rounding (1e-5 of its output's range), which in a deep model may move a value that lies between two codes to
    the other one.
    Attention that was quantised (``attention_bits``) multiplies bytes too, where the processor can
    (:func:`integer_attention`). What has no integer form stays as it is, fake-quantised. ``made.bfloat16()`` runs what
    is left of floating point in bfloat16; scales stay float32. Compiled, traced or exported, and on other devices than
    the CPU, it multiplies the same integers in float32.

    Args:
        model: A module with plugged layers, on the CPU for the fast kernels.
        backend: ``auto``, or ``native``, ``onednn`` (an error where they can't) or ``reference``.
        fuse: Take batch norms and activations into the layers before them, hand bytes from layer to layer where the
            forward can be traced, and run what is left in functions of our own; see :func:`fuse_model`.

    Returns:
        The model, and ``{path: reason}`` for the layers and attention modules that stay.

    Raises:
        LossplugError: No layer could be converted; scales that were never set or are not above 0.
    """
    made: dict[str, IntegerLayer] = {}
    left: dict[str, str] = {}
    for name, layer in plugged_layers(model):
        found = integer_layer(layer, name, backend)
        if isinstance(found, str):
            left[name] = found
        else:
            made[name] = found
    if not made:
        why = next(iter(left.items()), ("the model", "it has no quantised layer"))
        raise LossplugError(f"no layer can be put in integers: {why[1]}", where=why[0])
    twin = copy.deepcopy(model)
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, layer)
    for name, attending in attending_layers(twin):
        attention = attention_of(attending)
        if isinstance(attention, AttentionQuant) and backend != "reference":
            on_bytes = integer_attention(attention)
            if isinstance(on_bytes, str):
                left[f"{name} (attention)"] = on_bytes
            else:
                replace_attention(attending, on_bytes)
    twin.eval().requires_grad_(False)  # no gradient goes through integers
    if fuse:
        fuse_model(twin)
    return twin, left


def fuse_model(model: nn.Module) -> None:
    """Takes the batch norms, layer scales and activations of a model with integer layers into them, in place.

    Where a compiler is there, gated feed-forward modules become one (:func:`fuse_gates`), norms and attention functions
    of one pass (:func:`replace_norms`, :func:`replace_attentions`), and modules made of such functions alone, like the
    blocks of a ViT, run as one (:func:`record_modules`).
    """
    fold_batch_norm(model, inplace=True)
    fold_layer_scales(model)
    fuse_gates(model)
    fuse_layers(model)
    replace_norms(model)
    replace_attentions(model)
    record_modules(model)
