"""Compressors that send every coordinate in a few bits: its sign, its power of two, its level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.communication.base import Compressor, Draw, Message, pack_bits, unpack_bits
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register

LEAST, MOST = -126, 127  # exponents of normal float32 numbers


def scaled_sign(v: Tensor) -> Tensor:
    r"""Returns :math:`(\|v\|_1/d)\,\mathrm{sign}(v)`; a zero counts as positive, since a bit has two values."""
    scale = v.abs().mean()
    return torch.where(v < 0, -scale, scale)


def natural(v: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds every magnitude to one of the two powers of two around it, at random and without bias.

    Magnitudes below 2^-126 become zero; above 2^127 they become 2^127.
    """
    return _from_exponents(_exponents(v, generator), v < 0, v)


def qsgd(v: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    r"""Rounds :math:`|v|/\|v\|_2` at random and without bias to one of ``levels`` equal steps above zero."""
    norm = torch.linalg.vector_norm(v)
    return norm / levels * _levels(v, norm, levels, generator)


def _exponents(v: Tensor, generator: torch.Generator) -> Tensor:
    """Returns biased exponents, 0 for zero."""
    mantissa, exponent = torch.frexp(v.abs())
    up = torch.rand(v.shape, generator=generator, device=v.device) < 2 * mantissa - 1
    power = (exponent - 1 + up.to(exponent.dtype)).clamp(max=MOST)
    return torch.where((v == 0) | (power < LEAST), 0, power - LEAST + 1).to(torch.uint8)


def _from_exponents(codes: Tensor, negative: Tensor, like: Tensor) -> Tensor:
    size = (codes.to(torch.int32) << 23).view(torch.float32).to(like.dtype)  # the codes are float32's own exponents
    return torch.where(negative, -size, size)


def _levels(v: Tensor, norm: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Returns signed levels in the dtype of v."""
    place = torch.where(norm > 0, v.abs() * (levels / norm), 0.0)
    low = place.floor()
    up = torch.rand(v.shape, generator=generator, device=v.device, dtype=v.dtype) < place - low
    return ((low + up).clamp(max=levels) * v.sign()).to(v.dtype)


@register(
    "compressor",
    "scaled_sign",
    family="quantised",
    paper="Error Feedback Fixes SignSGD and other Gradient Compression Schemes",
    arxiv="1901.09847",
)
class ScaledSign(Compressor):
    r"""One bit per entry and the mean magnitude; see :func:`scaled_sign`.

    Contractive with :math:`a = \|v\|_1^2/(d\|v\|_2^2)`, which depends on the data: 1/d at worst, 2/pi for
    normal entries.
    """

    name: ClassVar[str] = "scaled_sign"

    def encode(self, v: Tensor, draw: Draw) -> Message:
        """The mean magnitude, and packed signs."""
        return v.abs().mean().reshape(1), pack_bits((v < 0).flatten().to(torch.uint8), 1)

    def decode(self, message: Message, like: Tensor, draw: Draw) -> Tensor:
        """The mean magnitude with the signs."""
        scale, signs = message
        negative = unpack_bits(signs, 1, like.numel()).bool().reshape(like.shape)
        return torch.where(negative, -scale, scale).to(like.dtype)

    def message_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """A bit per entry and one value."""
        return itemsize + -(-math.prod(shape) // 8)

    def contraction(self, numel: int) -> None:
        """It depends on the data."""
        return


@register(
    "compressor",
    "natural",
    family="quantised",
    paper="Natural Compression for Distributed Deep Learning",
    arxiv="1905.10988",
)
class Natural(Compressor):
    """Nine bits per entry, a sign and an exponent; see :func:`natural`. Unbiased with omega = 1/8.

    Args:
        unbiased: Send the unbiased form; else it is divided by 1 + omega, which makes it contractive (a = 8/9).
    """

    name: ClassVar[str] = "natural"
    homogeneous: ClassVar[bool] = False  # by powers of two only

    def __init__(self, unbiased: bool = False) -> None:
        self.unbiased = unbiased

    def encode(self, v: Tensor, draw: Draw) -> Message:
        """Exponents, and packed signs."""
        signs = pack_bits((v < 0).flatten().to(torch.uint8), 1)
        return _exponents(v, draw.own(v.device)).flatten(), signs

    def decode(self, message: Message, like: Tensor, draw: Draw) -> Tensor:
        """Powers of two with their signs."""
        codes, signs = message
        negative = unpack_bits(signs, 1, like.numel()).bool()
        rounded = _from_exponents(codes, negative, like).reshape(like.shape)
        return rounded if self.unbiased else rounded / (1 + self.omega(like.numel()))

    def message_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Nine bits per entry."""
        numel = math.prod(shape)
        return numel + -(-numel // 8)

    def omega(self, numel: int) -> float:
        """1/8."""
        return 1 / 8

    def contraction(self, numel: int) -> float:
        """8/9."""
        return 1 / (1 + self.omega(numel))


@register(
    "compressor",
    "qsgd",
    family="quantised",
    paper="QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
    arxiv="1610.02132",
)
class QSGD(Compressor):
    r"""Random rounding to a few levels of the norm; see :func:`qsgd`.

    Unbiased with :math:`\omega = \min(d/s^2, \sqrt d/s)`, s levels. Levels are packed in 2, 4 or 8 bits; the entropy
    code of the paper isn't used.

    Args:
        levels: Steps above zero, 1 to 127. Up to 1 an entry takes 2 bits, up to 7 4 bits.
        unbiased: Send the unbiased form; else it is divided by 1 + omega, which makes it contractive.

    Raises:
        LossplugError: ``levels`` out of range.
    """

    name: ClassVar[str] = "qsgd"

    def __init__(self, levels: int = 7, unbiased: bool = False) -> None:
        self.levels = int(check_number(self.name, "levels", levels, least=1, most=127))
        self.unbiased = unbiased
        self.bits = 2 if self.levels == 1 else 4 if self.levels <= 7 else 8

    def encode(self, v: Tensor, draw: Draw) -> Message:
        """The norm, and packed levels."""
        norm = torch.linalg.vector_norm(v)
        codes = (_levels(v, norm, self.levels, draw.own(v.device)).flatten() + self.levels).to(torch.uint8)
        return norm.reshape(1), pack_bits(codes, self.bits)

    def decode(self, message: Message, like: Tensor, draw: Draw) -> Tensor:
        """Levels times the step."""
        norm, packed = message
        codes = unpack_bits(packed, self.bits, like.numel()).to(like.dtype) - self.levels
        rounded = (norm / self.levels * codes).to(like.dtype).reshape(like.shape)
        return rounded if self.unbiased else rounded / (1 + self.omega(like.numel()))

    def message_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """A few bits per entry and the norm."""
        return itemsize + -(-math.prod(shape) * self.bits // 8)

    def omega(self, numel: int) -> float:
        """min(d/s^2, sqrt(d)/s)."""
        return min(numel / self.levels**2, math.sqrt(numel) / self.levels)

    def contraction(self, numel: int) -> float:
        """1/(1 + omega)."""
        return 1 / (1 + self.omega(numel))
