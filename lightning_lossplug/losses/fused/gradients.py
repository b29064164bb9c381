"""Gradients of a linear head, summed over row chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_lossplug.losses.fused.precision import statistics_dtype
from lightning_lossplug.losses.fused.tiles import add_rows, tile_logits

WEIGHT_TILE = 8192  # columns of the head that are converted, or multiplied into a buffer, at a time


class HeadGradients:
    """Gradients of hidden states, weight and bias, to which every chunk adds its part.

    The weight's is summed in float32 or wider; where the weight has that dtype, in the result itself.

    Args:
        hidden: All hidden states [R, D], in their own dtype.
        weight: The classifier [V, D], in its own dtype.
        factor: The classifier as :func:`narrowed` for the products.
        bias: [V] or None.
        needed: Which of the three to compute.
        dtype: Dtype of the products.
        u: Weights [V] of the sum statistic; None: ones.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        factor: Tensor,
        bias: Tensor | None,
        needed: Sequence[bool],
        dtype: torch.dtype,
        u: Tensor | None,
    ) -> None:
        self.source, self.weight, self.dtype, self.exact = hidden, factor, dtype, statistics_dtype(dtype)
        self.result_dtype = weight.dtype
        wide = torch.promote_types(self.exact, weight.dtype)
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.matrix = torch.empty(weight.shape, dtype=wide, device=weight.device) if needed[1] else None
        self.bias = hidden.new_zeros(weight.shape[0], dtype=self.exact) if needed[2] and bias is not None else None
        self.u = u
        self._u_weight: Tensor | None = None
        self._constant = hidden.new_zeros(hidden.shape[1], dtype=self.exact)
        self._has_constant = False

    def add(
        self,
        part: slice,
        z: Tensor,
        y: Tensor | None = None,
        label: Tensor | None = None,
        scale: Tensor | None = None,
        constant: Tensor | None = None,
    ) -> None:
        """Adds what follows from a gradient by the logits ``diag(scale) z + label e_y^T + constant u^T`` of some rows.

        Args:
            part: The rows; they come in order.
            z: [r, V], zero at the labels.
            y: Labels [r], or None where there are none.
            label: Entries at the labels, [r].
            scale: [r]; None: ones.
            constant: [r]; None: zeros. Not together with a bias.
        """
        if self.hidden is not None:
            product = self._times_weight(z)
            if scale is not None:
                product.mul_(scale[:, None])
            if constant is not None:
                product.addr_(constant, self._u_times_weight())
            if y is not None and label is not None:
                add_rows(product, self.weight, y, label)
            self.hidden[part] = product
        if self.matrix is not None:
            h = self.source[part].to(self.exact)
            if constant is not None:
                self._has_constant = True
                self._constant += constant @ h
            self._add_outer(z, h, scale, first=part.start == 0)
            if y is not None and label is not None:
                self.matrix.index_add_(0, y, (h * label[:, None]).to(self.matrix.dtype))
        if self.bias is not None and y is not None and label is not None:
            self.bias.index_add_(0, y, label)

    def finished(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the three gradients in the dtypes of their tensors."""
        matrix = self.matrix
        if matrix is not None and self._has_constant:
            u = matrix.new_ones(matrix.shape[0]) if self.u is None else self.u.to(matrix.dtype)
            matrix.addr_(u, self._constant.to(matrix.dtype))
        return (
            self.hidden,
            None if matrix is None else matrix.to(self.result_dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )

    def _times_weight(self, z: Tensor) -> Tensor:
        if self.weight.dtype == z.dtype:
            return torch.mm(z, self.weight).to(self.exact)
        product = z.new_zeros((z.shape[0], self.weight.shape[1]))
        for columns in _tiles(self.weight):
            product.addmm_(z[:, columns], self.weight[columns].to(z.dtype))
        return product

    def _u_times_weight(self) -> Tensor:
        if self._u_weight is None:
            self._u_weight = torch.zeros_like(self._constant)
            for columns in _tiles(self.weight):
                w = self.weight[columns].to(self.exact)
                self._u_weight += w.sum(dim=0) if self.u is None else self.u[columns] @ w
        return self._u_weight

    def _add_outer(self, z: Tensor, h: Tensor, scale: Tensor | None, first: bool) -> None:
        """``matrix += z^T diag(scale) h`` (``=`` for the first chunk)."""
        total = self.matrix
        if total is None:
            return
        if z.dtype == total.dtype:
            h = h if scale is None else h * scale[:, None]
            if first:
                torch.mm(z.T, h, out=total)
            else:
                total.addmm_(z.T, h)
            return
        top = None
        if scale is not None:  # brought to at most 1: equal scales then cost no rounding, and float16 stays in range
            top = scale.abs().amax()
            h = h * (scale / torch.where(top > 0, top, 1))[:, None]
        h = h.to(self.dtype)
        for columns in _tiles(total):
            product = torch.mm(z[:, columns].T, h).to(total.dtype)
            if top is not None:
                product.mul_(top)
            if first:
                total[columns] = product
            else:
                total[columns].add_(product)


def narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the weight in a narrower dtype; a wider one is made a tile at a time where it is needed."""
    return weight.to(dtype) if weight.dtype.itemsize > dtype.itemsize else weight


def row_logits(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes all raw logits of some rows into ``out`` [r, V]."""
    if weight.dtype == h.dtype:
        tile_logits(h, weight, bias, slice(0, weight.shape[0]), out)
        return
    for columns in _tiles(weight):
        tile_logits(h, weight, bias, columns, out[:, columns])


def _tiles(weight: Tensor) -> Iterator[slice]:
    for start in range(0, weight.shape[0], WEIGHT_TILE):
        yield slice(start, min(start + WEIGHT_TILE, weight.shape[0]))
