"""Linear layers with 4-bit weights in groups, for decoding: one token reads every weight once, so bytes are time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_finite
from lightning_lossplug.quantization.integer import quantizer_of, weight_codes
from lightning_lossplug.surgery.plug import INPUT, PluggedLayer, fold, plain_class
from lightning_lossplug.surgery.select import default_exclusions

GROUPS = (32, 64, 128, 256)  # what torch's kernel knows
ROWS = 8  # of the input: above, unpacking the weights once for a bfloat16 product is faster


class Int4Weight(NamedTuple):
    """A matrix as ``code * scale + zero``, codes from -8 to 7.

    Args:
        codes: [N, K], int8.
        scale: [N, K / group_size], bfloat16.
        zero: Value of code 0 in every group, as ``scale``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def int4_weight(weight: Tensor, group_size: int = 64, *, where: str = "int4_weight") -> Int4Weight:
    """Rounds a matrix to 16 levels between the least and the largest entry of each group.

    Scale and offset are rounded to bfloat16 first, codes are then the nearest for those.

    Args:
        weight: [N, K].
        group_size: 32, 64, 128 or 256; divides K.
        where: Name for messages.

    Raises:
        LossplugError: No matrix, another group size or one that doesn't divide K, values that are not finite.
    """
    if weight.ndim != 2:
        raise LossplugError(f"the weight has shape {tuple(weight.shape)}, expected [N, K]", where=where)
    reason = _unfit(weight.shape[1], group_size)
    if reason is not None:
        raise LossplugError(reason, where=where, remedy=_remedy(weight.shape[1]))
    check_finite(where, weight, "weight")
    w = weight.detach().float().unflatten(1, (-1, group_size))
    low, high = w.amin(-1), w.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-8).bfloat16()
    zero = ((low + high + scale.float()) / 2).bfloat16()
    codes = ((w - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(-8, 7)
    return Int4Weight(codes.flatten(1).to(torch.int8), scale, zero)


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights; products are in bfloat16, the output has the dtype of the input.

    Few rows go through torch's 4-bit kernel, more through unpacked weights.

    Args:
        weight: Codes, scales and offsets.
        bias: Float bias or None.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        codes = weight.codes.to(torch.int16) + 8
        self.register_buffer("packed", (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8))
        self.register_buffer("scale", weight.scale.bfloat16().contiguous())
        self.register_buffer("zero", weight.zero.bfloat16().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())
        self.out_features, self.in_features = codes.shape
        self.group_size = self.in_features // weight.scale.shape[1]
        self._kernel: tuple[Tensor, Tensor] | None = None
        self._tried = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product."""
        flat = x.reshape(-1, self.in_features).bfloat16()
        kernel = self._kernel_weights() if len(flat) <= ROWS else None
        if kernel is None:
            y = F.linear(flat, self.weight, self.bias)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, kernel[0], self.group_size, kernel[1])
            y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    @property
    def codes(self) -> Tensor:
        """[N, K], from -8 to 7."""
        both = torch.stack([self.packed & 15, self.packed >> 4], -1)
        return both.flatten(1).to(torch.int8) - 8

    @property
    def weight(self) -> Tensor:
        """The unpacked weight, bfloat16."""
        value = self.codes.to(torch.bfloat16).unflatten(1, (-1, self.group_size))
        return torch.addcmul(self.zero[..., None], value, self.scale[..., None]).flatten(1)

    def _kernel_weights(self) -> tuple[Tensor, Tensor] | None:
        if not self._tried:
            self._tried, self._kernel = True, None
            if self.packed.device.type == "cpu":
                try:
                    self._kernel = self._pack()
                except (RuntimeError, AttributeError, NotImplementedError):  # not built in, or not this shape
                    self._kernel = None
        return self._kernel

    def _pack(self) -> tuple[Tensor, Tensor] | None:
        ops = torch.ops.aten
        grid = torch.stack([self.scale, self.zero], -1).transpose(0, 1).contiguous()
        kernel = ops._convert_weight_to_int4pack_for_cpu(self.codes.to(torch.int32) + 8, 1)
        x = torch.randn(2, self.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        got = ops._weight_int4pack_mm_for_cpu(x, kernel, self.group_size, grid).float()
        want = F.linear(x.float(), self.weight.float())
        close = (got - want).abs().max() <= 0.02 * want.abs().max().clamp_min(1e-30)
        return (kernel, grid) if bool(close) else None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: getattr(self, name) for name in ("scale", "zero", "bias") if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            setattr(self, name, old.to(self.packed.device))
        self._tried, self._kernel = False, None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kernel": None, "_tried": False}

    def extra_repr(self) -> str:
        """Shape and group size."""
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, bias={self.bias is not None}"


@torch.no_grad()
def int4_model(
    model: nn.Module,
    group_size: int = 64,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, str]]:
    """Returns a copy of a model in bfloat16 whose linear layers have 4-bit weights in groups.

    Layers trained or calibrated to 4 bits (symmetric codes, one scale per channel, tensor or group of a size the
    kernel knows) keep their codes; others are rounded by :func:`int4_weight`. A layer tied to an embedding gets
    weights of its own; the embedding stays as it is.

    Args:
        model: A module; plugged layers are folded in the copy.
        group_size: 32, 64, 128 or 256 weights of a row share a scale.
        include: Glob patterns of layer paths. The output layer is left out unless a pattern without wildcards names it.
        exclude: Patterns that are left out.

    Returns:
        The model, in eval mode, and ``{path: reason}`` for the linear layers that stay.

    Raises:
        LossplugError: No layer could be converted, or one that a pattern without wildcards names.
    """
    heads = default_exclusions(model)
    made: dict[str, Int4Linear] = {}
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        if plain_class(layer) is not nn.Linear:
            continue
        named = name in include
        if any(fnmatchcase(name, glob) for glob in exclude) or not any(fnmatchcase(name, glob) for glob in include):
            left[name] = "not in include" if not any(fnmatchcase(name, glob) for glob in exclude) else "excluded"
            continue
        reason = heads.get(id(layer._parameters["weight"]))
        if reason is not None and not named:
            reason = "tied to the embedding" if reason == "embedding" else reason
            left[name] = f"{reason}; include it by its full name to take it"
            continue
        found = _converted(layer, group_size, name)
        if isinstance(found, str):
            if named:
                raise LossplugError(found, where=name, remedy=_remedy(layer.in_features))
            left[name] = found
        else:
            made[name] = found
    if not made:
        where, why = next(iter(left.items()), ("the model", "it has no linear layer"))
        raise LossplugError(f"no layer can have 4-bit weights: {why}", where=where)
    twin = fold(model) if any(isinstance(m, PluggedLayer) for m in model.modules()) else copy.deepcopy(model)
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, layer)
    return twin.bfloat16().eval(), left


def _converted(layer: Any, group_size: int, where: str) -> Int4Linear | str:
    reason = _unfit(layer.in_features, group_size)
    if reason is not None:
        return reason
    weight = quantizer_of(layer)
    if weight is None:
        return Int4Linear(int4_weight(layer.weight, group_size, where=where), layer.bias)
    weight.check_ready()
    if quantizer_of(layer, INPUT) is not None:
        return "its input is quantised too: integer_model keeps that"
    if not weight.has_codes or weight.layout.axis != 0:
        return f"{weight.name} has no codes of 4 bits"
    coded = weight_codes(layer, weight)
    if int(coded.codes.min()) < -8 or int(coded.codes.max()) > 7 or coded.zero_point is not None:
        return f"the codes of {weight.name} are not those of 4 signed bits"
    own = weight.layout.group_size
    if own is not None and own not in GROUPS:
        return f"its groups of {own} are not 32, 64, 128 or 256"
    scale = coded.scale.reshape(-1, coded.scale.shape[1] if own is not None else 1)
    scale = scale.expand(layer.out_features, layer.in_features // group_size if own is None else scale.shape[1])
    return Int4Linear(
        Int4Weight(coded.codes.to(torch.int8), scale.bfloat16(), torch.zeros_like(scale).bfloat16()), layer.bias
    )


def _unfit(columns: int, group_size: int) -> str | None:
    if group_size not in GROUPS:
        return f"group_size is {group_size}, allowed is 32, 64, 128 or 256"
    return f"groups of {group_size} don't divide its {columns} inputs" if columns % group_size else None


def _remedy(columns: int) -> str:
    fitting = [str(g) for g in GROUPS if columns % g == 0]
    return f"Use a group_size of {' or '.join(fitting)}" if fitting else "Exclude the layer"
