"""GPTQ: columns are rounded one by one, and the rest of each row makes up for the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_range
from lightning_lossplug.quantization.post.layer import LayerProblem
from lightning_lossplug.quantization.post.method import PostTrainingMethod
from lightning_lossplug.registry import register

Grid = tuple[Tensor, Tensor]


def gptq(
    w: Tensor,
    hessian: Tensor,
    s: Tensor,
    z: Tensor | None = None,
    low: int = -7,
    high: int = 7,
    damp: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
    group_size: int | None = None,
    regrid: Callable[[Tensor], Grid] | None = None,
) -> Tensor:
    r"""Returns the rounded weight ``[rows, columns]`` with least output error for inputs of second moment ``hessian``.

    With U the upper Cholesky factor of the inverse of the damped H, columns go from left to right:
    :math:`q_j = Q(w_j)`, :math:`e = (w_j - q_j)/U_{jj}`, :math:`w_{k} \mathrel{-}= e\,U_{jk}` for all k > j.

    Args:
        w: Weights ``[rows, columns]``.
        hessian: Sum of x x^T over the inputs, ``[columns, columns]``, up to any positive factor.
        s: Steps that broadcast against ``w``.
        z: Zero-points, shaped as ``s``; None is 0.
        low: Least code.
        high: Largest code.
        damp: Share of the mean diagonal that is added to the diagonal, >= 0; ten times more while H is singular.
        act_order: Columns with the largest diagonal first; the result is in the order of ``w``.
        block_size: Columns between two updates of everything to their right; changes speed only.
        group_size: Columns that share a step, for ``regrid``.
        regrid: Gives step and zero-point ``[rows, 1]`` of a group when its first column is reached, from the updated
            weights; ``s`` and ``z`` (shaped as ``w``) then receive them in place.

    Raises:
        LossplugError: A value out of range, or a moment matrix that stays singular.

    Source: Frantar et al., GPTQ, arXiv 2210.17323.
    """
    check_range("gptq", "damp", damp, 0)
    check_range("gptq", "block_size", block_size, 1)
    if regrid is not None and (act_order or not group_size):
        raise LossplugError("regrid needs group_size, and columns in their order", where="gptq")
    columns = w.shape[1]
    w = w.detach().clone()
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    z = torch.zeros_like(s) if z is None else z
    step, zero = s.expand_as(w), z.expand_as(w)
    order = torch.arange(columns, device=w.device)
    if act_order:
        order = h.diagonal().argsort(descending=True)
        w, h, step, zero = w[:, order], h[order][:, order], step[:, order], zero[:, order]
    u = _inverse_factor(h, damp).to(w.dtype)
    q = torch.empty_like(w)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, errors = w[:, start:end].clone(), torch.empty_like(w[:, start:end])
        for j in range(start, end):
            i = j - start
            if regrid is not None and group_size and j % group_size == 0:
                # what lies beyond this block has not been updated by it yet
                stop = min(j + group_size, columns)
                rest = w[:, end:stop] - errors[:, :i] @ u[start:j, end:stop]
                fresh = regrid(torch.cat([block[:, i : stop - start], rest], 1))
                step[:, j:stop], zero[:, j:stop] = fresh
            code = ((block[:, i] / step[:, j]).round() + zero[:, j]).clamp(low, high)
            q[:, j] = (code - zero[:, j]) * step[:, j]
            errors[:, i] = (block[:, i] - q[:, j]) / u[j, j]
            block[:, i + 1 :].addr_(errors[:, i], u[j, j + 1 : end], alpha=-1)
        w[:, end:] -= errors @ u[start:end, end:]
    return q[:, order.argsort()] if act_order else q


def _inverse_factor(h: Tensor, damp: float) -> Tensor:
    """Returns U, upper, with U^T U the inverse of the damped matrix."""
    mean = h.diagonal().mean()
    for _ in range(6):
        damped = h + damp * mean * torch.eye(len(h), dtype=h.dtype, device=h.device)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not info:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not info:
                return upper
        damp = max(10 * damp, 1e-4)
    raise LossplugError(
        "the moments of its inputs have no inverse", where="gptq", remedy="Look for NaN, or give more calibration data"
    )


@register(
    "post_training",
    "gptq",
    family="rounding",
    paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    arxiv="2210.17323",
)
class GPTQ(PostTrainingMethod):
    """Rounds a weight column by column against the second moments of its inputs; see :func:`gptq`.

    Convolutions are products of columns too, groups of channels each by itself. Steps of groups are measured when
    their group is reached, or beforehand with ``act_order``.

    Args:
        damp: Share of the mean diagonal added to the diagonal, >= 0.
        act_order: Columns with the largest diagonal first.
        block_size: Columns per block, for speed.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "gptq"

    def __init__(self, damp: float = 0.01, act_order: bool = False, block_size: int = 128) -> None:
        check_range(self.name, "damp", damp, 0)
        check_range(self.name, "block_size", block_size, 1)
        self.damp, self.act_order, self.block_size = damp, act_order, block_size

    def solve(self, problem: LayerProblem) -> Tensor:
        """Solves every group of the layer's channels."""
        quantizer, moments = problem.affine, problem.moments()
        low, high = quantizer.bounds
        w = problem.matrix(problem.weight)
        layout = quantizer.layout
        shape = problem.weight.shape
        wide = torch.ones_like(problem.weight)

        def spread(values: Tensor) -> Tensor:
            return problem.matrix(layout.restore(layout.arrange(wide) * values, shape)).contiguous()

        s, z = spread(quantizer.s), spread(quantizer.z)
        size = layout.group_size

        def regrid(group: Tensor) -> Grid:
            step, zero = quantizer.measure(group.unsqueeze(1))
            return step.reshape(-1, 1), zero.reshape(-1, 1)

        moving = bool(size) and not self.act_order and w.shape[1] % (size or 1) == 0
        q = torch.empty_like(w)
        for part, h in zip(torch.arange(len(w), device=w.device).chunk(len(moments)), moments, strict=True):
            step, zero = s[part], z[part]
            q[part] = gptq(
                w[part],
                h,
                step,
                zero,
                low,
                high,
                self.damp,
                self.act_order,
                self.block_size,
                size if moving else None,
                regrid if moving else None,
            )
            s[part], z[part] = step, zero
        if moving and size:
            quantizer.set_grid(s[:, ::size], z[:, ::size])
        return problem.from_matrix(q)
