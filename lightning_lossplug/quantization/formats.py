"""Floating-point grids: minifloats with any range, OCP microscaling blocks, NVFP4."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import Role, check_bits, check_choice, check_range
from lightning_lossplug.registry import register


class Element(NamedTuple):
    """A small number format: exponent bits, mantissa bits, exponent of the largest power of two, largest value."""

    exponent: int
    mantissa: int
    emax: int
    max: float


ELEMENTS = {
    "fp8_e4m3": Element(4, 3, 8, 448.0),
    "fp8_e5m2": Element(5, 2, 15, 57344.0),
    "fp6_e3m2": Element(3, 2, 4, 28.0),
    "fp6_e2m3": Element(2, 3, 2, 7.5),
    "fp4_e2m1": Element(2, 1, 2, 6.0),
    "int8": Element(0, 6, 0, 1 + 63 / 64),
}


def floor_log2(x: Tensor) -> Tensor:
    """Returns ``floor(log2 |x|)`` exactly, from the exponent bits; 0 gives a very low number."""
    exponent = torch.frexp(x).exponent - 1
    return torch.where(x == 0, -1000, exponent)


def round_element(x: Tensor, element: str) -> Tensor:
    """Rounds to the nearest value of an element format (half to even), saturating; no gradient.

    Raises:
        LossplugError: Unknown format.
    """
    check_choice("mx", "elem", element, ELEMENTS)
    e, m, _, top = ELEMENTS[element]
    if e == 0:
        return (x * 2**m).round().clamp(-(2 ** (m + 1)) + 1, 2 ** (m + 1) - 1) / 2**m
    least = 2 - 2 ** (e - 1)  # exponent of the smallest normal number; one step size serves the subnormals below it
    power = floor_log2(x).clamp_min(least) - m
    # ldexp is exact where multiplying by a power of two held as a float32 might not be
    return torch.ldexp(torch.ldexp(x, -power).round(), power).clamp(-top, top)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mask = ctx.saved_tensors[0]
        return grads[0] if mask is None else grads[0] * mask, None, None


def fp_quant(x: Tensor, max: Tensor | float = 448.0, bits: int = 8, mantissa: int = 3) -> Tensor:
    r"""Rounds to a minifloat whose largest value is ``max``, a real number.

    :math:`bias = 2^E - \log_2 max + \log_2(2 - 2^{-M}) - 1`, :math:`p = \max(\lfloor \log_2|x| + bias \rfloor, 1)`,
    step :math:`2^{p-M-bias}`; every exponent code is a number (no infinity, no NaN). The gradient is g inside
    [-max, max]; a ``max`` tensor gets the sum of g times :math:`(\hat x - x)/max` inside and :math:`\hat x/max`
    beyond, the exponent of each element being a constant.

    Args:
        x: Any shape.
        max: Largest value > 0, a number or a tensor that broadcasts.
        bits: 3 to 8, sign included.
        mantissa: Mantissa bits M, 0 to ``bits - 2``; the exponent has the rest.

    Raises:
        LossplugError: A value out of range.

    Source: Kuzmin et al., FP8 Quantization: The Power of the Exponent, arXiv 2208.09225.
    """
    bits = check_bits("fp_quant", bits, 3, 8)
    check_range("fp_quant", "mantissa", mantissa, 0, bits - 2)
    top = torch.as_tensor(max, dtype=x.dtype, device=x.device)
    if not isinstance(max, Tensor):
        check_range("fp_quant", "max", max, 1e-30)
    return _FloatGrid.apply(x, top, bits - 1 - mantissa, mantissa)


class _FloatGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, top: Tensor, e: int, m: int) -> Tensor:
        ctx.save_for_backward(x, top)
        # On the grid scaled so that its largest value is (2 - 2^-M) 2^(2^E - 1 - bias0), a power of two times integers.
        unit = top.clamp_min(1e-30) / (2 - 2.0**-m)  # the largest power of two of the grid
        v = torch.minimum(torch.maximum(x, -top), top) / unit
        power = floor_log2(v).clamp(2 - 2**e, 0) - m
        value = torch.ldexp(torch.ldexp(v, -power).round(), power) * unit
        ctx.value = value
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, top = ctx.saved_tensors
        g = grads[0]
        inside = x.abs() <= top
        dtop = None
        if ctx.needs_input_grad[1]:
            slope = (torch.where(inside, ctx.value - x, ctx.value)) / top.clamp_min(1e-30)
            dtop = (g * slope).sum_to_size(top.shape) if top.ndim else (g * slope).sum()
        return g * inside, dtop, None, None


ScaleMode = Literal["floor", "ceil", "even", "rceil"]


def _blocks(x: Tensor, block: int, axis: int) -> tuple[Tensor, int]:
    moved = x.movedim(axis, -1)
    pad = -moved.shape[-1] % block
    moved = F.pad(moved, (0, pad)) if pad else moved
    return moved.reshape(*moved.shape[:-1], -1, block), pad


def _unblock(blocks: Tensor, pad: int, axis: int) -> Tensor:
    flat = blocks.reshape(*blocks.shape[:-2], -1)
    return (flat[..., : flat.shape[-1] - pad] if pad else flat).movedim(-1, axis)


def _mx_exponent(amax: Tensor, elem: str, scale_mode: str) -> Tensor:
    element = ELEMENTS[elem]
    if scale_mode == "rceil":
        ratio = amax / element.max
        low = floor_log2(ratio)
        k = low + (ratio > torch.ldexp(torch.ones_like(ratio), low)).to(low)
    else:
        k = floor_log2(amax) - element.emax
        if scale_mode == "ceil":
            k = k + (amax > torch.ldexp(torch.ones_like(amax), floor_log2(amax))).to(k)
        elif scale_mode == "even":
            # round the maximum to the element's mantissa first: where that carries, the exponent is one higher
            step = floor_log2(amax) - element.mantissa
            k = floor_log2(torch.ldexp(torch.ldexp(amax, -step).round(), step)) - element.emax
    return k.clamp(-127, 127)


def mx(x: Tensor, elem: str = "fp8_e4m3", block: int = 32, axis: int = -1, scale_mode: ScaleMode = "floor") -> Tensor:
    r"""OCP microscaling: blocks share a power of two :math:`2^k`, :math:`k = \lfloor\log_2\max|x|\rfloor - e_{max}`.

    :math:`\hat x = 2^k\,elem(x/2^k)`, half to even, saturating; a block of zeros stays zero. The gradient is g where
    nothing saturates.

    Args:
        x: Any shape; a length that ``block`` doesn't divide is padded with zeros.
        elem: ``fp8_e4m3``, ``fp8_e5m2``, ``fp6_e3m2``, ``fp6_e2m3``, ``fp4_e2m1`` or ``int8``.
        block: Entries that share a scale.
        axis: The axis of the blocks, which has to be the reduction axis of the product.
        scale_mode: ``floor`` (the standard; the largest value may saturate), ``ceil``, ``even`` or ``rceil`` (never
            saturates).

    Raises:
        LossplugError: Unknown format or mode.

    Source: OCP Microscaling Formats v1.0; Rouhani et al., arXiv 2310.10537.
    """
    check_choice("mx", "elem", elem, ELEMENTS)
    check_choice("mx", "scale_mode", scale_mode, ("floor", "ceil", "even", "rceil"))
    check_range("mx", "block", block, 1)
    blocks, pad = _blocks(x.detach(), block, axis)
    k = _mx_exponent(blocks.abs().amax(-1, keepdim=True), elem, scale_mode)
    scaled = torch.ldexp(blocks, -k)
    value = torch.ldexp(round_element(scaled, elem), k)
    value = torch.where(blocks == 0, torch.zeros_like(value), value)
    inside = scaled.abs() <= ELEMENTS[elem].max
    return _Straight.apply(x, _unblock(value, pad, axis), _unblock(inside, pad, axis))


def nvfp4(x: Tensor, two_level: bool = True, axis: int = -1, amax: Tensor | None = None) -> Tensor:
    r"""NVFP4: blocks of 16 E2M1 values with a scale in E4M3, below one float32 scale of the tensor.

    One level: :math:`s = e4m3(\mathrm{clip}(a/6, 2^{-6}, 448))` for the block's largest magnitude a. Two levels:
    :math:`S = a_{tensor}/(448 \cdot 6)`, :math:`s = e4m3(\mathrm{clip}(a/(6S), 2^{-6}, 448))`, step s S.
    The gradient is g where nothing saturates.

    Args:
        x: Any shape; padded to blocks of 16.
        two_level: Use the scale of the tensor.
        axis: The axis of the blocks.
        amax: Largest magnitude of the tensor; None measures it.

    Source: the NVFP4 format; formula as in the two-level recipe of its vendor.
    """
    blocks, pad = _blocks(x.detach(), 16, axis)
    largest = blocks.abs().amax(-1, keepdim=True)
    outer = torch.ones((), dtype=x.dtype, device=x.device)
    if two_level:
        whole = blocks.abs().amax() if amax is None else amax.to(x)
        outer = (whole / (448.0 * 6.0)).clamp_min(1e-30)
    inner = round_element((largest / 6 / outer).clamp(2.0**-6, 448.0), "fp8_e4m3")
    step = inner * outer
    scaled = blocks / step
    value = round_element(scaled, "fp4_e2m1") * step
    return _Straight.apply(x, _unblock(value, pad, axis), _unblock(scaled.abs() <= 6, pad, axis))


@register(
    "quantizer",
    "fp_quant",
    family="float",
    paper="FP8 Quantization: The Power of the Exponent",
    arxiv="2208.09225",
    roles=("weight", "activation"),
)
class FPQuant(Quantizer):
    """A minifloat with a learned or measured largest value; see :func:`fp_quant`.

    Args:
        bits: 3 to 8, sign included.
        mantissa: Mantissa bits, 0 to ``bits - 2``; None: 3 of 8, 2 of 6, 1 of 4, else half of what the sign leaves.
        learn_max: Train the largest value.
        per_channel: One range per index of ``axis``.
        axis: Axis of the channels.
        role: ``weight`` or ``activation``.
        init_batches: Training batches that set the range of an activation.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "fp_quant"
    scales: ClassVar[dict[str, float]] = {"max": 1.0}
    positive: tuple[str, ...] = ("max",)

    max: Tensor

    def __init__(
        self,
        bits: int = 8,
        mantissa: int | None = None,
        learn_max: bool = False,
        per_channel: bool = False,
        axis: int = 0,
        role: Role = "weight",
        init_batches: int = 1,
    ) -> None:
        super().__init__(per_channel, None, axis, role, init_batches)
        self.bits = check_bits(self.name, bits, 3, 8)
        self.mantissa = {8: 3, 6: 2, 4: 1}.get(self.bits, (self.bits - 1) // 2) if mantissa is None else mantissa
        check_range(self.name, "mantissa", self.mantissa, 0, self.bits - 2)
        self.max.requires_grad_(learn_max)

    def set_scales(self, x: Tensor) -> None:
        """The largest magnitude."""
        top = x.abs().amax(self.layout.dims(x.ndim), keepdim=True).clamp_min(1e-12)
        self.max.data.copy_(top.reshape(self.max.shape))

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`fp_quant`."""
        return _FloatGrid.apply(x, self.max.clamp_min(1e-12), self.bits - 1 - self.mantissa, self.mantissa)


@register(
    "quantizer",
    "mx",
    family="float",
    paper="Microscaling Data Formats for Deep Learning",
    arxiv="2310.10537",
    roles=("weight", "activation"),
    blocks=True,
)
class MX(Quantizer):
    """Microscaling blocks (MXFP8, MXFP6, MXFP4, MXINT8), scaled anew at every pass; see :func:`mx`.

    Args:
        elem: Element format.
        block: Entries that share a scale.
        axis: Axis of the blocks: the reduction axis.
        scale_mode: ``floor``, ``ceil``, ``even`` or ``rceil``.
        role: ``weight`` or ``activation``.

    Raises:
        LossplugError: Unknown format or mode.
    """

    name: ClassVar[str] = "mx"

    def __init__(
        self,
        elem: str = "fp8_e4m3",
        block: int = 32,
        axis: int = -1,
        scale_mode: ScaleMode = "floor",
        role: Role = "weight",
    ) -> None:
        super().__init__(role=role)
        mx(torch.zeros(1), elem, block, -1, scale_mode)
        self.elem, self.block, self.axis, self.scale_mode = elem, block, axis, scale_mode
        self.bits = 8 if elem == "int8" else 1 + ELEMENTS[elem].exponent + ELEMENTS[elem].mantissa

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`mx`."""
        return mx(x, self.elem, self.block, self.axis, self.scale_mode)


@register("quantizer", "nvfp4", family="float", paper="NVFP4", roles=("weight", "activation"), blocks=True)
class NVFP4(Quantizer):
    """NVFP4 blocks, scaled anew at every pass; see :func:`nvfp4`.

    Args:
        two_level: Use a float32 scale of the tensor above the block scales.
        axis: Axis of the blocks: the reduction axis.
        role: ``weight`` or ``activation``.
    """

    name: ClassVar[str] = "nvfp4"
    bits = 4

    def __init__(self, two_level: bool = True, axis: int = -1, role: Role = "weight") -> None:
        super().__init__(role=role)
        self.two_level, self.axis = two_level, axis

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`nvfp4`."""
        return nvfp4(x, self.two_level, self.axis)
