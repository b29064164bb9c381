"""What the losses of embeddings share: checks, normalisation, precision, pairs from labels, means over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.ranks import gather_rows, sum_ranks, world_size
from lightning_lossplug.losses.reduction import reduce_rows


def check_range(where: str, name: str, value: float, allowed: str, ok: bool) -> None:
    """Raises :class:`LossplugError` unless ``ok``."""
    if not ok:
        raise LossplugError(f"{name} is {value}, allowed is {allowed}", where=where)


def full_precision(x: Tensor) -> torch.autocast:
    """Returns the context a loss body runs in: autocast off on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False)


def upcast(x: Tensor) -> Tensor:
    """Half precision becomes float32, anything else stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def l2_normalize(x: Tensor) -> Tensor:
    """Returns the rows of ``x`` [..., D] with length 1; a zero row stays zero and passes its gradient on unscaled."""
    # Dividing by the largest entry first keeps squares from overflowing or vanishing; the direction, and so the
    # gradient, doesn't depend on that factor.
    top = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(top > 0, top, 1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """Returns ``logsumexp`` of ``x`` [..., R] where ``mask``; a row without an entry is finite and to be left out."""
    some = mask.any(dim=-1, keepdim=True)
    return x.masked_fill(~mask & some, -torch.inf).logsumexp(dim=-1)


def check_embeddings(x: Tensor, where: str, name: str) -> None:
    """Raises :class:`LossplugError` unless ``x`` is a floating [B, D] with D >= 1."""
    if x.ndim != 2 or x.shape[1] == 0:
        raise LossplugError(f"{name} has shape {tuple(x.shape)}, expected [B, D]", where=where)
    if not x.is_floating_point():
        raise LossplugError(f"{name} has dtype {x.dtype}, expected a floating dtype", where=where)


def check_sample_labels(y: Tensor, x: Tensor, where: str, name: str) -> None:
    """Raises :class:`LossplugError` unless ``y`` is one integer per row of ``x``."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise LossplugError(f"{name} has dtype {y.dtype}, expected integer labels", where=where)
    if y.shape != x.shape[:1]:
        raise LossplugError(f"{name} has shape {tuple(y.shape)} for {x.shape[0]} embeddings", where=where)


class EmbeddingLoss(Loss, ABC):
    """A loss of embedding rows.

    Args:
        normalize: L2-normalise the embeddings inside. Turn it off for rows that are normalised already.
        gather: Take the batches of all ranks together (see :mod:`lightning_lossplug.losses.ranks`); without an
            initialised process group it changes nothing.
        reduction: ``none`` (one value per anchor of this rank, 0 for anchors left out), ``mean`` or ``sum``.
    """

    def __init__(self, normalize: bool = True, gather: bool = False, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.normalize, self.gather = normalize, gather

    def embed(self, x: Tensor, name: str) -> Tensor:
        """Returns checked rows in float32 or float64, normalised where ``normalize``."""
        check_embeddings(x, type(self).__name__, name)
        x = upcast(x)
        return l2_normalize(x) if self.normalize else x

    def embed_pair(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two views or modalities, row i of one belonging to row i of the other, as :meth:`embed` does."""
        if a.shape != b.shape:
            raise LossplugError(f"a {tuple(a.shape)} and b {tuple(b.shape)} differ in shape", where=type(self).__name__)
        a, b = self.embed(a, "a"), self.embed(b, "b")
        dtype = torch.promote_types(a.dtype, b.dtype)
        return a.to(dtype), b.to(dtype)

    def reduce(self, rows: Tensor, counted: Tensor | None, anchor: Tensor) -> Tensor:
        """Reduces the rows of this rank's anchors.

        Args:
            rows: Loss of each anchor, [A].
            counted: Which anchors the mean counts, [A]; None: all. The others contribute 0.
            anchor: What the zero of a batch without anchors hangs on: the gathered rows, so that every rank takes
                part in the backward messages.
        """
        if counted is None:
            counted = torch.ones_like(rows, dtype=torch.bool)
        rows = torch.where(counted, rows, 0)
        world = world_size(self.gather)
        if self.reduction == "mean":
            divisor = sum_ranks(self.gather, counted.sum().to(rows)) / world
            return reduce_rows(rows, divisor, "mean", anchor)
        reduced = reduce_rows(rows, None, self.reduction, anchor)
        return reduced * world if self.reduction == "sum" else reduced


class Pairs(NamedTuple):
    """Anchors against candidates.

    Args:
        similarity: ``x_i . x_j``, [A, R].
        positive: Pairs of one class, without the anchor itself, [A, R].
        negative: Pairs of different classes, [A, R].
        candidates: The candidate embeddings, [R, D].
    """

    similarity: Tensor
    positive: Tensor
    negative: Tensor
    candidates: Tensor


class PairLoss(EmbeddingLoss):
    """A loss of the similarities between anchors ``x`` and candidates, told apart by labels."""

    @abstractmethod
    def pair_loss(self, pairs: Pairs) -> Tensor:
        """Returns the reduced loss."""

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        ref_x: Tensor | None = None,
        ref_y: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            x: Embeddings [B, D].
            y: Integer labels [B].
            ref_x: Candidates [R, D] instead of the batch itself (a memory bank); nothing is excluded then.
            ref_y: Their labels [R].
            indices_tuple: Pairs to use instead of all, as miners give them: ``(anchor, positive, anchor, negative)``
                or triplets ``(anchor, positive, negative)``, index tensors into ``x`` and the candidates. A pair
                that is listed twice counts once.

        Raises:
            LossplugError: Shapes or dtypes that don't fit; ``indices_tuple`` together with ``gather``.
        """
        with full_precision(x):
            return self.pair_loss(self.pairs(self.embed(x, "x"), y, ref_x, ref_y, indices_tuple))

    def pairs(
        self,
        x: Tensor,
        y: Tensor,
        ref_x: Tensor | None,
        ref_y: Tensor | None,
        indices_tuple: Sequence[Tensor] | None,
        stride: int = 1,
    ) -> Pairs:
        """Builds similarities and masks; every ``stride``-th row of ``x`` is an anchor, all rows are candidates."""
        where = type(self).__name__
        check_sample_labels(y, x, where, "y")
        if (ref_x is None) != (ref_y is None):
            raise LossplugError("ref_x and ref_y go together, one of them is missing", where=where)
        if ref_x is None or ref_y is None:
            candidates, labels = x, y
        else:
            candidates, labels = self.embed(ref_x, "ref_x").to(x.dtype), ref_y
            check_sample_labels(ref_y, ref_x, where, "ref_y")
            if ref_x.shape[1] != x.shape[1]:
                raise LossplugError(f"ref_x has width {ref_x.shape[1]}, x has {x.shape[1]}", where=where)
        if indices_tuple is not None and world_size(self.gather) > 1:
            raise LossplugError(
                "indices_tuple holds indices into the batch of one rank, gather=True spans all",
                where=where,
                remedy="Leave one of them out",
            )
        (candidates, labels), start = gather_rows(self.gather, candidates, labels)
        if indices_tuple is not None:
            positive, negative = pair_masks(indices_tuple, x.shape[0], candidates.shape[0], x.device, where)
            positive, negative = positive[::stride], negative[::stride]
        else:
            same = y[::stride, None] == labels[None, :]
            positive, negative = same, ~same
            if ref_x is None:
                own = torch.arange(start, start + x.shape[0], stride, device=x.device)
                positive = same & (own[:, None] != torch.arange(labels.shape[0], device=x.device))
        return Pairs(x[::stride] @ candidates.T, positive, negative, candidates)


def pair_masks(
    indices_tuple: Sequence[Tensor], anchors: int, candidates: int, device: torch.device, where: str
) -> tuple[Tensor, Tensor]:
    """Returns the masks [A, R] of the positive and negative pairs listed in ``indices_tuple``."""
    if len(indices_tuple) == 3:
        anchor, positive, negative = indices_tuple
        indices_tuple = (anchor, positive, anchor, negative)
    if len(indices_tuple) != 4:
        raise LossplugError(
            f"indices_tuple has {len(indices_tuple)} parts, expected 3 (triplets) or 4 (pairs)", where=where
        )
    masks = []
    for rows, columns in (indices_tuple[:2], indices_tuple[2:]):
        if rows.shape != columns.shape or rows.ndim != 1:
            raise LossplugError(
                f"indices_tuple pairs {tuple(rows.shape)} anchors with {tuple(columns.shape)} others", where=where
            )
        mask = torch.zeros(anchors, candidates, dtype=torch.bool, device=device)
        mask[rows.to(device), columns.to(device)] = True
        masks.append(mask)
    return masks[0], masks[1]
