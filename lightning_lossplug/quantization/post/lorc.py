"""LoRC: the error of a rounded weight, approximated by two small factors beside the layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_choice
from lightning_lossplug.quantization.post.layer import LayerProblem


def lorc(w: Tensor, quantized: Tensor, rank: int = 8, factor_bits: int = 16) -> tuple[Tensor, Tensor]:
    r"""Returns A ``[out, rank]`` and B ``[rank, in]`` with :math:`A B \approx W - Q(W)`, the best of that rank.

    :math:`W - Q(W) = U S V^T`, :math:`A = U_r S_r^{1/2}`, :math:`B = S_r^{1/2} V_r^T`.

    Args:
        w: Float weight ``[out, in]``.
        quantized: Its quantised values.
        rank: 1 to min(out, in).
        factor_bits: 16 (float16 values) or 8 (symmetric codes per row); 32 keeps the factors as they are.

    Raises:
        LossplugError: A rank or number of bits out of range.

    Source: Yao et al., ZeroQuant-V2, arXiv 2303.08302.
    """
    if not 1 <= rank <= min(w.shape):
        raise LossplugError(f"rank is {rank}, allowed is 1 to {min(w.shape)}", where="lorc")
    check_choice("lorc", "factor_bits", str(factor_bits), ("8", "16", "32"))
    u, s, v = torch.linalg.svd(w - quantized, full_matrices=False)
    root = s[:rank].sqrt()
    return _stored(u[:, :rank] * root, factor_bits), _stored(root[:, None] * v[:rank], factor_bits)


def _stored(factor: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return factor.half().to(factor.dtype)
    if bits == 8:
        step = (factor.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        return (factor / step).round() * step
    return factor


class LowRankError(nn.Module):
    """The factors beside a layer; their product of the input is added to the layer's output by a hook.

    Args:
        a: ``[out, rank]``.
        b: ``[rank, in]``.
    """

    NAME: ClassVar[str] = "low_rank_error"

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(x B^T) A^T``."""
        return (x @ self.b.T.to(x)) @ self.a.T.to(x)


def _add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + layer.get_submodule(LowRankError.NAME)(args[0])


def compensate(problem: LayerProblem, value: Tensor, rank: int, factor_bits: int = 16) -> Any:
    """Gives a layer the factors of its error, in the submodule ``low_rank_error``; returns the handle of its hook."""
    a, b = lorc(problem.matrix(problem.weight), problem.matrix(value), min(rank, *problem.weight.shape), factor_bits)
    layer = problem.layer
    layer.add_module(LowRankError.NAME, LowRankError(a, b).to(problem.weight.device))
    return layer.register_forward_hook(_add)
