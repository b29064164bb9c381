"""Base of the losses of scores against sets of positives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.embeddings import full_precision, upcast
from lightning_lossplug.losses.reduction import reduce_rows

Positives = Tensor | Sequence[Sequence[int]]


class ScoreSetLoss(Loss, ABC):
    """A loss of scores [B, L] and the set of positive labels of each row.

    Args:
        reduction: ``none`` ([B], 0 at rows left out), ``mean`` over the rows counted, or ``sum``.
    """

    @abstractmethod
    def rows(self, s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss of each row and whether it counts, [B] each; ``s`` and ``positive`` are [B, L]."""

    def forward(self, scores: Tensor, positives: Positives | None = None) -> Tensor:
        """Computes the loss.

        Args:
            scores: [B, L].
            positives: Positive labels: a mask [B, L] (bool, or floating with 0 and 1), indices [B] or [B, P] padded
                with negative numbers, or one list of indices per row. None: column 0 is the positive, the others
                are the sampled negatives.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        where = type(self).__name__
        if scores.ndim != 2 or scores.shape[1] == 0 or not scores.is_floating_point():
            raise LossplugError(
                f"scores have shape {tuple(scores.shape)} and dtype {scores.dtype}, expected floating [B, L]",
                where=where,
            )
        with full_precision(scores):
            s = upcast(scores)
            rows, counted = self.rows(s, positive_mask(positives, scores, where))
            return reduce_rows(torch.where(counted, rows, 0), counted.sum().to(s), self.reduction, s)


def positive_mask(positives: Positives | None, scores: Tensor, where: str) -> Tensor:
    """Returns the mask [B, L] of the positives in any of the forms of :meth:`ScoreSetLoss.forward`."""
    shape, device = scores.shape, scores.device
    if positives is None:
        return (torch.arange(shape[1], device=device) == 0).expand(shape)
    if not isinstance(positives, Tensor):
        width = max((len(row) for row in positives), default=0)
        padded = [[*row, *[-1] * (width - len(row))] for row in positives]
        index = torch.tensor(padded, dtype=torch.long, device=device).reshape(len(padded), width)
    elif positives.dtype == torch.bool or positives.is_floating_point():
        if positives.shape != shape:
            raise LossplugError(
                f"the mask of positives is {tuple(positives.shape)}, scores are {tuple(shape)}", where=where
            )
        return positives > 0
    elif positives.shape == shape:
        raise LossplugError(
            f"integer positives of the shape of the scores, {tuple(shape)}, may be a mask or indices",
            where=where,
            remedy="Pass a mask as bool, and indices with a column of -1 appended",
        )
    else:
        index = positives.long()
    if index.ndim not in (1, 2) or index.shape[0] != shape[0]:
        raise LossplugError(f"positives {tuple(index.shape)} don't fit scores {tuple(shape)}", where=where)
    index = index[:, None] if index.ndim == 1 else index
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and bool((index >= shape[1]).any()):
        raise LossplugError(f"positive {int(index.max())} is outside the {shape[1]} labels", where=where)
    # Padding is scattered to a column of its own, which is cut off.
    mask = torch.zeros(shape[0], shape[1] + 1, dtype=torch.bool, device=device)
    return mask.scatter(1, torch.where(index < 0, shape[1], index), True)[:, :-1]
