"""Quantised products as a Precision plugin: no state, no plugged layer, nothing in the checkpoint.

A template for number formats of one's own: :meth:`FakeQuantPrecision.round_weight` and
:meth:`FakeQuantPrecision.round_input` are all that a format is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_lossplug.errors import LossplugError

PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}


class FakeQuantPrecision(Precision):
    r"""Rounds the operands of every linear layer and convolution while a step runs: ``Trainer(plugins=[...])``.

    With :math:`c = 2^{b-1} - 1` levels, :math:`q(x) = s\,\mathrm{round}(x / s)`, :math:`s = \max|x| / c`: a scale per
    output channel of a weight and one per input tensor, taken anew at every call. The gradient passes as if nothing was
    rounded (straight-through). Training, validation, test and prediction compute alike; the weights stay what they are,
    so checkpoints, optimizers and exports know nothing of it, and an export is not quantised. :class:`QAT` learns its
    scales, leaves out layers and exports integers: take it for a model that is to leave in few bits, and this plugin to
    see what a format costs, or as the pattern of one. Computes in float32; ``precision=`` of the Trainer stays unset.
    Products that a fused kernel computes (attention) are left alone, and so is what ``torch.compile`` has compiled.

    Args:
        bits_w: Bits of weights, 2 to 16; null leaves them as they are.
        bits_a: Bits of inputs, 2 to 16; null leaves them as they are.

    Raises:
        LossplugError: Bits out of range.
    """

    precision = "32-true"

    def __init__(self, bits_w: int | None = 8, bits_a: int | None = 8) -> None:
        for name, bits in (("bits_w", bits_w), ("bits_a", bits_a)):
            if bits is not None and (not isinstance(bits, int) or not 2 <= bits <= 16):
                raise LossplugError(
                    f"{name} is {bits!r}",
                    where="FakeQuantPrecision",
                    remedy="Give a whole number from 2 to 16, or null",
                )
        self.bits_w, self.bits_a = bits_w, bits_a

    def round_weight(self, weight: Tensor) -> Tensor:
        """Returns a weight ``[C_out, ...]`` as the format holds it, with the gradient it is to have."""
        if self.bits_w is None:
            return weight
        return _rounded(
            weight, weight.detach().abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1)), self.bits_w
        )

    def round_input(self, x: Tensor) -> Tensor:
        """Returns the input of a product as the format holds it."""
        return x if self.bits_a is None else _rounded(x, x.detach().abs().amax(), self.bits_a)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Wraps every step of the module; the backward pass runs outside."""
        with _Products(self):
            yield


class _Products(TorchFunctionMode):
    """Hands the operands of products to the plugin."""

    def __init__(self, plugin: FakeQuantPrecision) -> None:
        super().__init__()
        self.plugin = plugin

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func not in PRODUCTS:
            return func(*args, **given)
        x, weight, *rest = (*args, *(given.pop(name) for name in ("input", "weight")[len(args) :]))
        return func(self.plugin.round_input(x), self.plugin.round_weight(weight), *rest, **given)


def _rounded(x: Tensor, largest: Tensor, bits: int) -> Tensor:
    levels = 2 ** (bits - 1) - 1
    scale = (largest / levels).clamp_min(torch.finfo(x.dtype).tiny)
    return x + (torch.round(x.detach() / scale) * scale - x.detach())
