"""A linear layer or convolution on integers: int8 weight codes, a step for the input, products in int32.

A linear layer runs through a function of our own where the processor has VNNI but no AMX instructions; it is faster
there than oneDNN's, and takes values to bytes in the same pass. All else runs through PyTorch's oneDNN int8 operators
where they exist, or as the same integers in float32. Those operators are what Inductor emits; they are not a documented
interface. Hence whatever is chosen has to pass a test on the layer's own weights first.
"""

from __future__ import annotations

from typing import Any, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.native import reachable
from lightning_lossplug.quantization.emission import PLAIN, Emission, emitted
from lightning_lossplug.quantization.grid import check_choice
from lightning_lossplug.quantization.linear_bytes import KINDS, LinearOnBytes, runs_here
from lightning_lossplug.quantization.rows import to_bytes, to_values, with_step
from lightning_lossplug.quantization.tape import changed
from lightning_lossplug.surgery.attention import unheard

Backend = Literal["auto", "native", "onednn", "reference"]
PACKS = 4  # shapes of a convolution's input whose packed weights are kept


class IntegerLayer(nn.Module):
    """A linear layer or convolution on integers, equal to the fake-quantised layer up to float32 rounding.

    Inputs are floating-point values, or bytes that the layer before has already quantised (see :class:`Emission`).

    Args:
        codes: Weight codes, int8, in the layer's layout.
        weight_scale: [C_out], or [1] for all.
        bias: Float bias or None.
        bounds: Least and largest code of the input.
        input_scale: Step of the input.
        input_zero: Code of an input of 0.
        convolution: Stride, padding, dilation and groups; None is a linear layer.
        dynamic: Measure the steps of every input instead (:func:`dynamic_step` with as many bits as the bounds have):
            one per token, or per sample of a convolution. ``input_scale`` is 1 then.
    """

    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        bounds: tuple[int, int],
        input_scale: Tensor,
        input_zero: int = 0,
        convolution: dict[str, Any] | None = None,
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int8))
        scale = weight_scale.float().reshape(-1)
        self.register_buffer("weight_scale", scale.expand(codes.shape[0]).contiguous())
        self.register_buffer("input_scale", input_scale.float().reshape(()))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.bounds, self.input_zero, self.convolution, self.dynamic = bounds, input_zero, convolution, dynamic
        # The kernels take unsigned bytes: a signed code c travels as c - bounds[0].
        self.shift = -bounds[0] if bounds[0] < 0 else 0
        self.backend = "reference"
        self.emission = PLAIN
        self.float_dtype = torch.float32  # of the output when the input is bytes
        self._zeros = torch.zeros(codes.shape[0], dtype=torch.int32)
        self._packed: dict[tuple[int, ...] | None, Tensor] = {}
        self._native: LinearOnBytes | None = None

    @property
    def function(self) -> LinearOnBytes | None:
        """The function of our own, if that is what computes this layer."""
        return self._native if self.backend == "native" else None

    @property
    def taken_as(self) -> Emission:
        """What the layer before has to emit so that this one takes it as it is; with one step for all inputs."""
        low, high = self.bounds
        bounds = (low + self.shift, high + self.shift)
        return Emission(scale=float(self.input_scale), zero=self.input_byte, bounds=bounds)

    @property
    def input_byte(self) -> int:
        """Byte of an input of 0."""
        return self.input_zero + self.shift

    @property
    def _inner_bias(self) -> Tensor | None:
        """What the product adds by itself: nothing where steps are taken in afterwards."""
        return None if self.dynamic else self.bias

    @property
    def weight(self) -> Tensor:
        """The weights that the codes stand for, float32."""
        return self.codes.float() * self.weight_scale.reshape(-1, *[1] * (self.codes.ndim - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output, in the dtype of ``x``."""
        with unheard():
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        # Neither kernel is an operator that could be traced, nor runs elsewhere than on the CPU.
        kernel = self.backend if reachable(x) else "reference"
        if kernel == "native":
            return self._alone(x.contiguous(), self.emission)
        if kernel == "onednn" and self.emission.bounds == PLAIN.bounds:  # it saturates at a byte's ends only
            return self._product(x, kernel, self.emission)
        return emitted(self._product(x, kernel, PLAIN), self.emission)

    def _product(self, x: Tensor, kernel: str, emission: Emission) -> Tensor:
        if self.dynamic:
            return self._dynamic(x, kernel)
        if kernel == "onednn":
            return self._fast(x if x.dtype == torch.uint8 else self.bytes_of(x), x.dtype, emission)
        if x.dtype == torch.uint8:
            return self._reference(x.float() - self.shift).to(self.float_dtype)
        low, high = self.bounds
        q = (x.float() / self.input_scale).round_().add_(self.input_zero).clamp_(low, high)
        return self._reference(q).to(x.dtype)

    def _alone(self, x: Tensor, emission: Emission) -> Tensor:
        assert self._native is not None
        if x.dtype not in KINDS:
            y = self._native(x.float(), torch.float32, emission)
            return y if emission.scale is not None else y.to(x.dtype)
        dtype = self.float_dtype if x.dtype == torch.uint8 else x.dtype
        return self._native(x, dtype, emission)

    def _dynamic(self, x: Tensor, kernel: str) -> Tensor:
        if self.convolution is not None and x.ndim != self.codes.ndim:
            raise LossplugError(f"an input of shape {tuple(x.shape)} has no batch", remedy="Add the axis: x[None]")
        rows = x.reshape(-1, x.shape[-1]) if self.convolution is None else x.flatten(1)
        q, steps = to_bytes(rows.detach(), self.bounds[1])
        q = q.reshape(x.shape)
        y = self._fast(q, torch.float32) if kernel == "onednn" else self._reference(q.float() - self.shift)
        if self.convolution is None:
            return to_values(y.reshape(-1, y.shape[-1]), steps, self.bias, x.dtype).reshape(*x.shape[:-1], -1)
        y = y * steps.reshape(-1, *[1] * (x.ndim - 1))
        return (y if self.bias is None else y + self.bias.reshape(-1, *[1] * (x.ndim - 2))).to(x.dtype)

    def bytes_of(self, x: Tensor) -> Tensor:
        """Returns the input's codes as unsigned bytes."""
        low, high = self.bounds
        return with_step(x, self.input_scale, self.input_byte, (low + self.shift, high + self.shift))

    def _reference(self, q: Tensor) -> Tensor:
        w, centred, bias = self.codes.float(), q - self.input_zero, self._inner_bias
        scale = self.weight_scale * self.input_scale
        if self.convolution is None:
            y = F.linear(centred, w) * scale
            return y if bias is None else y + bias
        product = {2: F.conv1d, 3: F.conv2d}[self.codes.ndim - 1](centred, w, **self.convolution)
        shape = (-1, *[1] * (self.codes.ndim - 2))
        y = product * scale.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)

    def _fast(self, q: Tensor, dtype: torch.dtype, out: Emission = PLAIN) -> Tensor:
        ops = torch.ops.onednn
        step, zero, bias = float(self.input_scale), self.input_byte, self._inner_bias
        wanted = dtype if dtype in (torch.float32, torch.bfloat16) else self.float_dtype
        if out.scale is not None:
            wanted = torch.uint8
        after = (out.scale or 1.0, out.zero, wanted, out.act, list(out.arguments), out.algorithm)
        c = self.convolution
        if c is None:
            flat = q.reshape(-1, q.shape[-1])
            packed = self._packed.get(None)
            if packed is None:
                packed = self._packed[None] = ops.qlinear_prepack(self.codes, list(flat.shape))
            y = ops.qlinear_pointwise(flat, step, zero, packed, self.weight_scale, self._zeros, bias, *after)
            y = y.reshape(*q.shape[:-1], -1)
        else:
            sizes = (c["stride"], c["padding"], c["dilation"], c["groups"])
            q = q.contiguous(memory_format=torch.channels_last)
            y = ops.qconv_pointwise(
                q, step, zero, self._pack_for(q), self.weight_scale, self._zeros, bias, *sizes, *after
            )
        return y.to(dtype) if wanted not in (dtype, torch.uint8) and dtype != torch.uint8 else y

    def _pack_for(self, q: Tensor) -> Tensor:
        # The best layout of the weights depends on the map; packed for another one they are reordered at every call.
        key: tuple[int, ...] | None = tuple(q.shape)
        if key not in self._packed:
            key = key if len(self._packed) < PACKS else None
            if key is not None or None not in self._packed:
                c = self.convolution
                assert c is not None
                sizes = (c["stride"], c["padding"], c["dilation"], c["groups"])
                step = float(self.input_scale)
                shape = None if key is None else list(key)
                self._packed[key] = torch.ops.onednn.qconv_prepack(
                    self.codes, self.weight_scale, step, self.input_byte, *sizes, shape
                )
        return self._packed[key]

    def use(self, backend: Backend) -> bool:
        """Chooses the kernel: ``native``, ``onednn``, ``reference``, or ``auto`` (the first that passes the test).

        Returns:
            Whether the choice could be made.

        Raises:
            LossplugError: Another name.
        """
        check_choice("integer layer", "backend", backend, get_args(Backend))
        changed()
        self.backend = "reference"
        self._native = None
        wanted = ("native", "onednn") if backend == "auto" else (backend,)
        good = next((name for name in wanted if name != "reference" and self._agrees(name)), None)
        self._packed.clear()
        if good != "native":
            self._native = None
        self.backend = good or "reference"
        return good is not None or backend in ("auto", "reference")

    def on_bytes(self, q: Tensor, kernel: str, emission: Emission = PLAIN) -> Tensor:
        """Returns what one kernel makes of an input of bytes: float32, or bytes where the emission has a step.

        Raises:
            RuntimeError: It can't compute this.
        """
        if kernel == "onednn":
            return self._fast(q, torch.float32, emission)
        if self._native is None:
            raise RuntimeError("there is no function of our own for this layer on this processor")
        return self._native(q.contiguous(), torch.float32, emission)

    def tried(self, emission: Emission) -> Tensor:
        """Returns what the kernel makes of a small batch, the same every time, and of an emission.

        Raises:
            RuntimeError: It can't compute this.
        """
        q = self.some_input()
        if self.dynamic:
            return self._alone(q * 0.25, emission)
        return self.on_bytes((q + self.shift).to(torch.uint8), self.backend, emission)

    def _agrees(self, name: str) -> bool:
        if self.codes.device.type != "cpu" or (self.convolution is not None and self.codes.ndim != 4):
            return False
        low, high = self.bounds
        q = self.some_input()
        if name == "native":
            if self.convolution is not None or not runs_here(self.codes):
                return False
            step = None if self.dynamic else float(self.input_scale)
            bounds = (low + self.shift, high + self.shift)
            self._native = LinearOnBytes(self.codes, self.weight_scale, self.bias, step, self.input_byte, bounds)
        try:
            if self.dynamic and name == "native":
                # Every row holds its largest code, so that its step is the one that was meant.
                q[..., 0] = high
                want = self._reference(q) * 0.25 + (0 if self.bias is None else self.bias)
                got = self._alone(q * 0.25, PLAIN)
            else:
                want = self._reference(q)
                got = self.on_bytes((q + self.shift).to(torch.uint8), name)
        except (RuntimeError, AttributeError, NotImplementedError):  # not built in, or not for this shape or processor
            return False
        return bool((want - got).abs().max() <= 1e-5 * (want.max() - want.min()).clamp_min(1e-30))

    def some_input(self) -> Tensor:
        """Returns a small batch of codes of an input, the same every time."""
        shape = (3, self.codes.shape[1]) if self.convolution is None else (2, *self._input_shape())
        low, high = self.bounds
        return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0)).float()

    def _input_shape(self) -> tuple[int, ...]:
        assert self.convolution is not None
        reach = [d * (k - 1) + 3 for d, k in zip(self.convolution["dilation"], self.codes.shape[2:], strict=True)]
        return (self.codes.shape[1] * self.convolution["groups"], *reach)

    @torch.no_grad()
    def fold_affine(self, scale: Tensor, shift: Tensor) -> None:
        """Takes a per-channel ``y * scale + shift`` behind the layer into its scales and bias; codes stay."""
        self.weight_scale.copy_(self.weight_scale * scale)
        self.bias = (shift if self.bias is None else self.bias * scale + shift).float()
        self.use(cast("Backend", self.backend))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Scales stay float32 whatever the model is cast to, as the kernels want them.
        kept = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        changed()
        if self.input_scale.dtype in (torch.float32, torch.bfloat16):
            self.float_dtype = self.input_scale.dtype
        for name, old in kept.items():
            self._buffers[name] = old.to(self.codes.device)
        if self.codes.device.type != "cpu":
            self.use("reference")
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.use(cast("Backend", self.backend))  # packed weights are those of the old codes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}, "_native": None}  # packed weights are no tensors that could be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.backend == "native":
            self.use("auto")

    def extra_repr(self) -> str:
        """Shape, range of the input, kernel, what is fused."""
        out = self.emission
        fused = f", {out.act}" if out.act != "none" else ""
        fused += ", bytes out" if out.scale is not None else ""
        steps = " with steps of its own" if self.dynamic else ""
        return f"{tuple(self.codes.shape)}, input {self.bounds}{steps}, backend={self.backend}{fused}"
