"""Binary 3x3 kernels from a small learned codebook (experimental: the paper's code was not at hand)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.quantization.grid import check_range
from lightning_lossplug.registry import register

CODES = 2**9


def binary_kernels(dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns all binary 3x3 kernels as columns, ``[9, 512]``."""
    bits = torch.arange(CODES)[None] >> torch.arange(9)[:, None] & 1
    return (2 * bits - 1).to(dtype)


def sinkhorn(x: Tensor, tau: float = 1e-2, iters: int = 10) -> Tensor:
    """Returns a doubly stochastic matrix near ``exp(x/tau)``: rows and columns are normalised in turns, as logarithms.

    Args:
        x: Square scores.
        tau: Temperature > 0.
        iters: Rounds >= 1.

    Raises:
        LossplugError: A value out of range.
    """
    check_range("sparse_kernel_bnn", "tau", tau, 1e-12)
    check_range("sparse_kernel_bnn", "sinkhorn_iters", iters, 1)
    logs = x.float() / tau if x.dtype in (torch.float16, torch.bfloat16) else x / tau
    for _ in range(iters):
        logs = logs - logs.logsumexp(1, keepdim=True)
        logs = logs - logs.logsumexp(0, keepdim=True)
    return logs.exp()


class _Permutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor) -> Tensor:
        optimize = require("scipy.optimize", "ptq", "sparse_kernel_bnn")
        rows, columns = optimize.linear_sum_assignment(soft.detach().cpu().numpy(), maximize=True)
        hard = torch.zeros_like(soft)
        hard[torch.as_tensor(rows), torch.as_tensor(columns)] = 1
        return hard

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0],)


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Tensor, codewords: Tensor) -> Tensor:
        chosen = (kernels @ codewords).argmax(1)  # all codewords are of one length
        ctx.save_for_backward(kernels, chosen)
        ctx.count = codewords.shape[1]
        return codewords[:, chosen].T.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernels, chosen = ctx.saved_tensors
        g = grads[0]
        summed = torch.zeros(ctx.count, g.shape[1], dtype=g.dtype, device=g.device).index_add(0, chosen, g)
        return g * (kernels.abs() <= 1), summed.T


@register(
    "function",
    "sparse_kernel_bnn",
    family="low-bit",
    paper="Compacting Binary Neural Networks by Sparse Kernel Selection",
    arxiv="2303.14470",
)
def sparse_kernel_bnn(
    w: Tensor,
    x: Tensor,
    n_codewords: int = 64,
    tau: float = 1e-2,
    sinkhorn_iters: int = 10,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Replaces every 3x3 kernel by the nearest of n binary ones that a learned permutation selects.

    :math:`P = \mathrm{Hungarian}(\mathrm{Sinkhorn}((X + \epsilon)/\tau))`, codewords :math:`U = B\,P_{:, :n}` of the
    book B of all 512. w gets a straight-through gradient where :math:`|w| \le 1`, each codeword the sum over its
    kernels, and X that of the soft permutation. Takes :math:`\log_2 n / 9` bits per weight. Experimental: written
    from a summary of the paper, no parity claimed; it is a function for a layer's own code, not a quantiser of QAT.

    Args:
        w: Weights ``[out, in, 3, 3]``.
        x: Learned scores ``[512, 512]``.
        n_codewords: A power of two, 2 to 512.
        tau: Temperature.
        sinkhorn_iters: Rounds of normalisation.
        noise: Gumbel noise shaped as ``x``, the same on every process; None is none.

    Raises:
        LossplugError: Other kernels, or a value out of range.
    """
    where = "sparse_kernel_bnn"
    if w.shape[-2:] != (3, 3):
        raise LossplugError(
            f"kernels are {tuple(w.shape[-2:])}, allowed is (3, 3)", where=where, remedy="Binarise other layers plainly"
        )
    if n_codewords not in [2**k for k in range(1, 10)]:
        raise LossplugError(f"n_codewords is {n_codewords}, allowed is a power of two from 2 to 512", where=where)
    if x.shape != (CODES, CODES):
        raise LossplugError(f"x has shape {tuple(x.shape)}, needed is ({CODES}, {CODES})", where=where)
    scores = x if noise is None else x + noise
    codewords = (
        binary_kernels(w.dtype).to(w.device)
        @ _Permutation.apply(sinkhorn(scores, tau, sinkhorn_iters).to(w.dtype))[:, :n_codewords]
    )
    return _Nearest.apply(w.reshape(-1, 9), codewords).reshape(w.shape)
