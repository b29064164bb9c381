"""A grid that is set once, from the weights or by a post-training method, and then stays."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.grid import EPS, Role, check_bits, check_choice, integer_range
from lightning_lossplug.quantization.observers import affine_parameters, fake_quant, minmax_range, mse_range
from lightning_lossplug.registry import register


@register(
    "quantizer",
    "affine",
    family="observer",
    paper="Quantizing deep convolutional networks for efficient inference",
    arxiv="1806.08342",
    roles=("weight",),
)
class Affine(Quantizer):
    r"""A fixed grid :math:`(\mathrm{clip}(\mathrm{round}(w/s) + z, Q_n, Q_p) - z)\,s`: what post-training leaves.

    Step and zero-point are set by the first weight and then are constants without a gradient. A weight that holds
    values of the grid keeps them to the last bit, so rounding that was chosen otherwise than to nearest survives.

    Args:
        bits: 2 to 8.
        symmetric: Zero-point 0, which int8 products need; else codes from 0.
        init: ``minmax``, or ``mse``: of 80 shrunk ranges the one with the least error.
        narrow_range: Symmetric codes without the most negative one.
        per_channel: One grid per index of ``axis``.
        group_size: One grid per this many consecutive entries of a channel.
        axis: Axis of the channels.
        role: ``weight``.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "affine"
    scales: ClassVar[dict[str, float]] = {"s": 1.0, "z": 0.0}
    positive: tuple[str, ...] = ("s",)

    s: Tensor
    z: Tensor

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = True,
        init: Literal["minmax", "mse"] = "mse",
        narrow_range: bool = True,
        per_channel: bool = False,
        group_size: int | None = None,
        axis: int = 0,
        role: Role = "weight",
    ) -> None:
        super().__init__(per_channel, group_size, axis, role)
        self.bits = check_bits(self.name, bits, 2, 8)
        check_choice(self.name, "init", init, ("minmax", "mse"))
        self.symmetric, self.init, self.narrow_range = symmetric, init, narrow_range
        self.s.requires_grad_(False)
        self.z.requires_grad_(False)

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and largest code."""
        return integer_range(self.bits, self.symmetric, self.narrow_range)

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns step and zero-point for an arranged tensor, by ``init``."""
        dims, by_rows = self.layout.dims(x.ndim), 0 not in self.layout.dims(x.ndim)
        rows = max(1, 2**16 // max(x[:1].numel(), 1))
        if self.init == "mse" and by_rows and len(x) > rows:
            # a few rows at a time stay in the cache for all 80 ranges
            parts = [self.measure(part) for part in x.split(rows)]
            return torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])
        if self.init == "mse":
            lo, hi = mse_range(x, self.bits, self.symmetric, dims, narrow_range=self.narrow_range)
        else:
            lo, hi = minmax_range(x, dims)
        s, z, _, _ = affine_parameters(lo, hi, self.bits, self.symmetric, self.narrow_range)
        # A channel of zeros, or of weights far below float32's grid, has no range: any step stores it.
        return torch.where(s > EPS, s, torch.ones_like(s)), z

    def set_scales(self, x: Tensor) -> None:
        """Measures the weight."""
        s, z = self.measure(x)
        self.set_grid(s, z)

    @torch.no_grad()
    def set_grid(self, s: Tensor, z: Tensor | None = None) -> None:
        """Sets step and zero-point, shaped like the present ones."""
        self.s.copy_(s.reshape(self.s.shape))
        self.z.copy_(torch.zeros_like(self.s) if z is None else z.reshape(self.z.shape))

    def snap(self, x: Tensor) -> Tensor:
        """See :func:`fake_quant`."""
        return fake_quant(x, self.s, self.z, *self.bounds)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and zero-point."""
        return self.s.detach(), None if self.symmetric else self.z.detach()
