"""Logits and masks of segmentation losses as probabilities per class: hard or soft labels, ignored pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import check_labels
from lightning_lossplug.losses.checks import check_floating, upcast


class Masks(NamedTuple):
    """Predicted and true masks of P pixels.

    Args:
        x: Predicted probabilities [B, C, P], 0 at ignored pixels.
        y: Labels in [0, 1], [B, C, P], 0 at ignored pixels.
        hard: Whether the labels were class indices.
    """

    x: Tensor
    y: Tensor
    hard: bool


def class_masks(logits: Tensor, target: Tensor, ignore_index: int, keep_mask: Tensor | None, where: str) -> Masks:
    """Returns masks of logits [B, C, *] and class indices [B, *] or probabilities [B, C, *].

    The classes are a softmax over C; with C = 1 there is one foreground class, a sigmoid, and hard labels are 0 and 1.

    Args:
        logits: [B, C, *], float32 or float64 after the upcast.
        target: Integer (or bool) class indices [B, *], or floating labels [B, C, *].
        ignore_index: Class index of pixels that are left out.
        keep_mask: Bool [B, *]; False leaves a pixel out, with hard and with soft labels.
        where: Name for errors.

    Raises:
        LossplugError: Shapes or dtypes that don't fit.
        LabelError: A label outside the classes (checked on CPU).
    """
    check_floating(where, logits=logits)
    if logits.ndim < 2 or logits.shape[1] == 0:
        raise LossplugError(f"logits have shape {tuple(logits.shape)}, expected [B, C, *]", where=where)
    batch, classes = logits.shape[:2]
    pixels = torch.Size((batch, *logits.shape[2:]))
    hard = not target.is_floating_point()
    if target.shape != (pixels if hard else logits.shape):
        raise LossplugError(
            f"targets {tuple(target.shape)} ({target.dtype}) don't fit logits {tuple(logits.shape)}",
            where=where,
            remedy="Expected class indices [B, *], or probabilities of the shape of the logits",
        )
    if keep_mask is not None and (keep_mask.shape != pixels or keep_mask.dtype != torch.bool):
        raise LossplugError(
            f"keep_mask is {tuple(keep_mask.shape)} {keep_mask.dtype}, expected bool {tuple(pixels)}", where=where
        )
    z = upcast(logits).reshape(batch, classes, logits[0, 0].numel() if batch else 0)
    keep = None if keep_mask is None else keep_mask.reshape(batch, -1)
    if hard:
        labels = target.reshape(batch, z.shape[2]).long()
        check_labels(labels.reshape(-1), max(classes, 2), ignore_index, where)
        kept = labels != ignore_index
        keep = kept if keep is None else keep & kept
        labels = torch.where(keep, labels, 0)
        y = labels[:, None].to(z) if classes == 1 else F.one_hot(labels, classes).movedim(-1, 1).to(z)
    else:
        y = target.reshape(z.shape).to(z)
    if keep is not None:
        # The logits are replaced before the softmax, so that a NaN at an ignored pixel reaches no gradient.
        z = torch.where(keep[:, None], z, 0)
        y = torch.where(keep[:, None], y, 0)
    x = z.sigmoid() if classes == 1 else z.softmax(dim=1)
    return Masks(x if keep is None else x * keep[:, None], y, hard)


def ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Returns ``top / bottom``, and 1 where both are 0: nothing predicted, nothing there."""
    return torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1), 1)
