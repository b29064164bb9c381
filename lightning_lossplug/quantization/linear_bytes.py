"""Linear layers on bytes in one function, for processors with VNNI instructions (AVX-512)."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.native import load_with
from lightning_lossplug.quantization.emission import Emission
from lightning_lossplug.quantization.tape import running_tape

SOURCE = Path(__file__).with_name("linear_bytes.cpp")
WIDEST = 1 << 16  # inputs whose products surely fit 32 bits
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_EACH = 1 << 19  # products that are worth a thread
_ACTIVATIONS = {"none": 0, "relu": 1, "hardtanh": 1, "gelu": 2, "gelu tanh": 3, "swish": 4, "hardswish": 5}


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "zero", "top", "activation", "out_zero")),
        *((name, ctypes.c_double) for name in ("step", "low", "high", "least", "most")),
        *((name, ctypes.c_double) for name in ("out_step", "out_low", "out_high")),
        *((name, ctypes.c_void_p) for name in ("weights", "sums", "scales", "bias")),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("problem", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "kind", "out_kind", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "times", "plus", "y")),
    ]


@cache
def _library() -> ctypes.CDLL | str:
    library = load_with(SOURCE, _Call, "lossplug_linear_bytes", "this processor has no VNNI, or has AMX")
    if not isinstance(library, str):
        library.lossplug_integer_linear.argtypes = [ctypes.c_void_p]
        library.lossplug_integer_linear.restype = None
    return library


def runs_here(codes: Tensor) -> bool:
    """Tells whether :class:`LinearOnBytes` can compute a layer: by processor, compiler, device and width."""
    return not isinstance(_library(), str) and codes.device.type == "cpu" and 0 < codes.shape[1] <= WIDEST


class LinearOnBytes:
    """A linear layer whose rows become bytes, are multiplied, and leave as values or bytes, in one pass.

    Only where :func:`runs_here`.

    Args:
        codes: Weight codes, int8 ``[C_out, C_in]``, at most ``2**16`` inputs.
        weight_scale: Float32 ``[C_out]``.
        bias: Float32 ``[C_out]`` or None.
        step: Step of the input; None gives every row a step of its own.
        zero: Byte of an input of 0.
        bounds: Least and largest byte of the input.
    """

    def __init__(
        self,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        step: float | None,
        zero: int,
        bounds: tuple[int, int],
    ) -> None:
        outputs, inputs = codes.shape
        across, depth = -outputs % 16, -inputs % 4
        # Four neighbours of a row for sixteen columns lie together: 64 bytes, which one instruction multiplies.
        whole = F.pad(codes, (0, depth, 0, across))
        weights = whole.reshape(-1, 16, whole.shape[1] // 4, 4).transpose(1, 2).contiguous()
        sums = whole.sum(1, dtype=torch.int32) * zero
        scales = F.pad(weight_scale.float(), (0, across))
        added = torch.zeros_like(scales) if bias is None else F.pad(bias.float(), (0, across))
        self.held = weights, sums, scales, added
        self.outputs, self.inputs = outputs, inputs
        low, high = (float(end - zero) for end in bounds)
        self.fields: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "zero": zero, "low": low, "high": high}
        # Rows with steps of their own reach from -top to top; the byte of 0 is top there.
        self.fields |= {"step": step or 0.0, "top": 0 if step is not None else int(high)}
        self.fields |= dict(zip(("weights", "sums", "scales", "bias"), (t.data_ptr() for t in self.held), strict=True))
        self._problems: dict[Emission, _Linear] = {}
        library = _library()
        assert not isinstance(library, str), library
        self._function = library.lossplug_integer_linear

    def __call__(self, x: Tensor, dtype: torch.dtype, emission: Emission, times: Tensor | None = None) -> Tensor:
        """Returns the layer's output ``[..., C_out]``.

        Args:
            x: ``[..., C_in]``, contiguous; float32, bfloat16, or bytes.
            dtype: Of the output, float32 or bfloat16; bytes where the emission has a step.
            emission: What happens to the output.
            times: Float32 ``[..., C_out]``, contiguous; multiplies what the activation gives, before a step is taken.

        Raises:
            LossplugError: An input of another width.
        """
        if not x.ndim or x.shape[-1] != self.inputs:
            raise LossplugError(
                f"an input of shape {tuple(x.shape)} for a layer of {self.inputs} inputs",
                where="integer layer",
                remedy=f"Give it {self.inputs} values in the last axis",
            )
        problem = self._problems.get(emission) or self._problem(emission)
        y = torch.empty(*x.shape[:-1], self.outputs, dtype=dtype if emission.scale is None else torch.uint8)
        rows = x.numel() // self.inputs
        if rows:
            call = _Call(
                *(ctypes.addressof(problem), rows, KINDS[x.dtype], KINDS[y.dtype]),
                max(1, min(torch.get_num_threads(), rows * self.inputs * self.outputs // _EACH)),
                *(x.data_ptr(), None if times is None else times.data_ptr(), None, y.data_ptr()),
            )
            self._function(ctypes.addressof(call))
            if (tape := running_tape()) is not None:
                reads = {"x": x} if times is None else {"x": x, "times": times}
                tape.add(self._function, call, reads, {"y": y}, self, "plus" if emission.scale is None else None)
        return y

    def _problem(self, emission: Emission) -> _Linear:
        least, most = emission.arguments if emission.act == "hardtanh" else (0.0, math.inf)
        low, high = emission.bounds
        self._problems[emission] = made = _Linear(
            **self.fields,
            activation=_ACTIVATIONS["gelu tanh" if emission.algorithm == "tanh" else emission.act],
            least=least,
            most=most,
            out_step=emission.scale or 1.0,
            out_zero=emission.zero,
            out_low=low - emission.zero,
            out_high=high - emission.zero,
        )
        return made
