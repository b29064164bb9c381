"""Norms of a model in integers, computed in one pass over the rows."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.native import load_with, takes
from lightning_lossplug.quantization.tape import changed, running_tape
from lightning_lossplug.surgery.attention import unheard

SOURCE = Path(__file__).with_name("norm_rows.cpp")
_EACH = 1 << 14  # entries that are worth a thread


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("size", "rows", "columns", "centred", "threads")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "x", "y")),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    library = load_with(SOURCE, _Norm, "lossplug_norm_bytes", "its arguments have another layout")
    if isinstance(library, str):
        return None
    library.lossplug_norm_rows.argtypes = [ctypes.c_void_p]
    library.lossplug_norm_rows.restype = None
    return library


class NormRows(nn.Module):
    """Layer norm or RMS norm over the last axis, for inference.

    Float32 inside, whatever the dtype of the input; weight and bias stay float32 when the model is cast.

    Args:
        weight: ``[C]``.
        bias: ``[C]`` or None.
        eps: Added to the mean square.
        centred: Take the mean away first (layer norm).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().float().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().float().contiguous())
        self.eps, self.centred = eps, centred

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of ``x``, in its dtype.

        Raises:
            LossplugError: An input of another width.
        """
        with unheard():
            if x.shape[-1:] != self.weight.shape:
                raise LossplugError(
                    f"an input of shape {tuple(x.shape)} for a norm of {len(self.weight)} channels",
                    where="norm",
                    remedy=f"Give it {len(self.weight)} values in the last axis",
                )
            # In this order: a compiler that traces this must not look into the loading of a library.
            if x.dtype in (torch.float32, torch.bfloat16) and takes(x) and (library := _library()) is not None:
                y, columns = torch.empty_like(x), x.shape[-1]
                bias = None if self.bias is None else self.bias.data_ptr()
                rows, threads = x.numel() // columns, max(1, min(torch.get_num_threads(), x.numel() // _EACH))
                sizes = (x.element_size(), rows, columns, self.centred, threads, self.eps)
                call = _Norm(*sizes, self.weight.data_ptr(), bias, x.data_ptr(), y.data_ptr())
                library.lossplug_norm_rows(ctypes.addressof(call))
                if (tape := running_tape()) is not None:
                    tape.add(library.lossplug_norm_rows, call, {"x": x}, {"y": y}, (self.weight, self.bias))
                return y
            wide = x.float()
            if self.centred:
                wide = wide - wide.mean(-1, keepdim=True)
            y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight
            return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            self._buffers[name] = old.to(self.weight.device)
        changed()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        changed()

    def extra_repr(self) -> str:
        """Width and kind."""
        return f"{len(self.weight)}, eps={self.eps}, {'layer norm' if self.centred else 'RMS norm'}"


@torch.no_grad()
def replace_norms(model: nn.Module) -> int:
    """Replaces the norms of a model on the CPU by :class:`NormRows`, in place.

    Layer norms and RMS norms of torch, and modules that call themselves some RMSNorm, like those of transformers
    (with a weight, or one more than the weight). Each is tried on numbers first and stays if the two differ.

    Returns:
        How many were replaced.
    """
    count = 0
    if _library() is None:
        return count
    for path, module in list(model.named_modules()):
        made = _norm_of(module) if path else None
        if made is not None:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
            count += 1
    return count


def _norm_of(module: nn.Module) -> NormRows | None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    layer_norm = isinstance(module, nn.LayerNorm)
    if not layer_norm and not type(module).__name__.endswith("RMSNorm"):
        return None
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.device.type != "cpu":
        return None
    hooked = module._forward_hooks or module._forward_pre_hooks or any(True for _ in module.children())
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if hooked or (eps is not None and not isinstance(eps, float)):
        return None
    eps = torch.finfo(weight.dtype).eps if eps is None else eps
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(weight.dtype)
    try:
        want = module(x)
    except Exception:  # a norm that wants more than an input
        return None
    if not isinstance(want, Tensor) or want.shape != x.shape:
        return None
    tolerance = 1e-5 if weight.dtype == torch.float32 else 0.02
    for gain in (weight, weight.float() + 1):
        made = NormRows(gain, bias if isinstance(bias, Tensor) else None, eps, layer_norm).eval()
        if bool((made(x) - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-30)):
            return made
    return None
