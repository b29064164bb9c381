"""The base class of the quantisers: layout, precision, initialisation from data, codes; each method writes ``snap``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import (
    EPS,
    Layout,
    Role,
    check_choice,
    check_finite,
    largest_over_ranks,
    mean_over_ranks,
    upcast,
)
from lightning_lossplug.surgery.shards import full


class Codes(NamedTuple):
    """A quantised tensor: integers, and what turns them into values again.

    Args:
        codes: int32, the shape of the tensor.
        scale: Step per tensor, channel or group.
        zero_point: Code of the value 0, or None where that is 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


class Quantizer(nn.Module, ABC):
    """A map from a tensor to the nearest points of a small grid, with a surrogate gradient.

    Half-precision tensors are rounded in float32 and given back in their own dtype; scales stay float32 whatever the
    module is cast to. Weights set their scales when they are first seen, activations from the first
    ``init_batches`` training batches (the mean over processes and batches) and pass through until then.

    Args:
        per_channel: One scale per index of ``axis``.
        group_size: One scale per this many consecutive entries of a channel.
        axis: Axis of the channels.
        role: ``weight`` or ``activation``.
        init_batches: Training batches that set the scales of an activation, >= 1.
    """

    name: ClassVar[str]
    scales: ClassVar[dict[str, float]] = {}  # learned tensors with the layout's shape, and what they hold until set
    positive: tuple[str, ...] = ()  # those that have to stay above 0

    seen: Tensor
    negative: Tensor

    def __init__(
        self,
        per_channel: bool = False,
        group_size: int | None = None,
        axis: int = 0,
        role: Role = "weight",
        init_batches: int = 1,
    ) -> None:
        super().__init__()
        self.where = self.name
        check_choice(self.name, "role", role, ("weight", "activation"))
        if init_batches < 1:
            raise LossplugError(f"init_batches is {init_batches}, allowed is >= 1", where=self.name)
        if role == "activation" and (per_channel or group_size):
            raise LossplugError(
                "activations have one scale per tensor", where=self.name, remedy="Leave per_channel and group_size out"
            )
        self.layout = Layout(per_channel, group_size, axis)
        self.role, self.init_batches = role, init_batches
        self.paused = False  # a second pass over the same batch must not move statistics
        self.just_set: dict[str, Tensor] = {}  # by the last forward pass, where processes may share out the parameters
        for name, value in self.scales.items():
            self.register_parameter(name, nn.Parameter(torch.full((1,), value)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("negative", torch.zeros((), dtype=torch.bool))
        # A Python mirror of the two buffers, so that a forward pass never waits for a device.
        self.mode: tuple[int, bool] = (0, False)

    @abstractmethod
    def snap(self, x: Tensor) -> Tensor:
        """Returns the quantised values of an arranged float32 or float64 tensor, with the surrogate gradient."""

    def set_scales(self, x: Tensor) -> None:
        """Sets the learned scales from an arranged tensor."""

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns step and zero-point for an arranged tensor: values are ``(code - zero_point) * step``."""
        raise LossplugError(f"{self.name} has no integer codes", where=self.where)

    @property
    def ready(self) -> bool:
        """Whether the scales have been set."""
        return self.mode[0] > 0

    def initialize(self, x: Tensor) -> Self:
        """Allocates and sets the scales from a tensor; a second batch of activations is averaged with the first.

        Raises:
            LossplugError: NaN or infinite entries, or a shape the layout doesn't fit.
        """
        with torch.no_grad():
            self.layout.check(x.shape, self.where)
            check_finite(self.where, x, self.role)
            wide = self.layout.arrange(upcast(x.detach()))
            shape = self.layout.scale_shape(x.shape)
            before = {}
            for name in self.scales:
                parameter = self.get_parameter(name)
                if parameter.shape != shape or parameter.device != x.device:
                    parameter.data = torch.full(shape, self.scales[name], dtype=parameter.dtype, device=x.device)
                before[name] = parameter.detach().clone()
            seen, negative = self.mode
            below = (wide.min() < 0).to(torch.float32)
            if self.role == "activation":
                below = largest_over_ranks(below)
            self.mode = (seen, negative or bool(below))
            self.set_scales(wide)
            for name, old in before.items():
                value = self.get_parameter(name)
                if self.role == "activation":
                    mean_over_ranks(value.data)
                if seen:
                    value.copy_((old * seen + value) / (seen + 1))
            self.mode = (seen + 1, self.mode[1])
            self.seen.fill_(self.mode[0])
            self.negative.fill_(self.mode[1])
            if self.role == "activation" and torch.distributed.is_available() and torch.distributed.is_initialized():
                self.just_set = {name: self.get_parameter(name).detach().clone() for name in self.scales}
        return self

    def due(self) -> bool:
        """Whether the next tensor sets the scales."""
        if self.role == "weight":
            return not self.ready
        return self.mode[0] < self.init_batches and self.training and not self.paused

    def forward(self, x: Tensor) -> Tensor:
        """Returns the quantised tensor, in the shape and dtype of ``x``."""
        if self.due():
            self.initialize(x)
        if not self.ready:
            return x
        return self.layout.restore(self.snap(self.layout.arrange(upcast(x))), x.shape).to(x.dtype)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Codes:
        """Returns the codes of a tensor; ``dequantize`` of them is ``forward(x)`` to the last bit, in eval mode.

        Raises:
            LossplugError: No batch has set the scales yet, or a scale is not above 0.
        """
        self.check_ready()
        wide = self.layout.arrange(upcast(x))
        step, zero = self.grid(wide)
        value = self.snap(wide)
        # The value is code * step in floating point, so dividing gives the code back whatever the rounding was.
        codes = torch.round(value / step)
        if zero is not None:
            codes = codes + zero
        return Codes(self.layout.restore(codes, x.shape).to(torch.int32), step.detach().clone(), zero)

    @torch.no_grad()
    def dequantize(self, codes: Codes) -> Tensor:
        """Returns the values of codes, in the precision of the scales."""
        value = self.layout.arrange(codes.codes).to(codes.scale.dtype)
        if codes.zero_point is not None:
            value = value - codes.zero_point
        return self.layout.restore(value * codes.scale, codes.codes.shape)

    def check_ready(self) -> None:
        """Raises :class:`LossplugError` when scales were never set, or have left the positive numbers."""
        if not self.ready:
            raise LossplugError(
                "no training batch has set its scales yet",
                where=self.where,
                remedy="Train, or run a calibration batch; exclude a layer whose forward the model never calls",
            )
        for name in self.positive:
            scale = full(self.get_parameter(name))
            bad = int((~((scale > EPS) & scale.isfinite())).sum())
            if bad:
                raise LossplugError(
                    f"{bad} of {self.get_parameter(name).numel()} values of {name} are zero, negative or not finite",
                    where=self.where,
                    remedy="Train longer, or with a smaller learning rate of the scales",
                )

    def advance(self, fraction: float) -> None:
        """Moves a schedule of the quantiser to a fraction of the run."""

    def add_gradients(self, grad_scale: float = 1.0) -> None:
        """Adds the gradients of the quantiser's own penalties, just before the optimizer steps."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: p.detach().clone() for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = old.to(parameter.device)
        return self

    @property
    def has_codes(self) -> bool:
        """Whether its values are whole multiples of a step, which integers can hold."""
        return type(self).grid is not Quantizer.grid

    @property
    def has_zero(self) -> bool:
        """Whether 0 is on the grid, so that pruned weights stay 0."""
        return True

    def forget(self) -> None:
        """Lets the next tensor set the scales again."""
        self.mode = (0, False)
        with torch.no_grad():
            self.seen.zero_()
            self.negative.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a dense checkpoint, which loads strictly
        if not self.ready:
            for name in self.scales:
                saved = state_dict.get(prefix + name)
                if isinstance(saved, Tensor) and saved.shape != self.get_parameter(name).shape:
                    parameter = self.get_parameter(name)
                    parameter.data = torch.empty(saved.shape, dtype=parameter.dtype, device=parameter.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.mode = (int(self.seen), bool(self.negative))

    def extra_repr(self) -> str:
        """Role and layout."""
        return f"role={self.role}, {self.layout}"


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Within the context no quantiser of the model updates its statistics."""
    found = [m for m in model.modules() if isinstance(m, Quantizer)]
    for quantizer in found:
        quantizer.paused = True
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.paused = False
