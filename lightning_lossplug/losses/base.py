"""Base classes of the losses: shapes, precision, ignored rows, weights and reduction, done once for all.

A classification loss writes one method: :meth:`ClassificationLoss.rows` (any function of logits and class index),
or :meth:`FusableLoss.from_stats` when the logits enter only through the statistics of
:mod:`lightning_lossplug.losses.stats`; then the chunked linear head can use it too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.reduction import check_reduction, reduce_rows
from lightning_lossplug.losses.stats import LogitStats, logit_stats


def check_parameter(ok: bool, where: str, name: str, value: object, allowed: str) -> None:
    """Raises :class:`LossplugError` that says which values a parameter may have, unless ``ok``."""
    if not ok:
        raise LossplugError(f"{name} is {value!r}, allowed is {allowed}", where=where)


def upcast(z: Tensor) -> Tensor:
    """Returns half-precision tensors as float32, others as they are."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def check_index(index: Tensor | None, target: Tensor, size: int, where: str) -> Tensor:
    """Returns the sample numbers of a table of ``size`` samples, on the device of ``target``.

    Raises:
        LossplugError: They are missing, not integers of the shape of ``target``, or (checked on CPU) beyond the table.
    """
    if index is None or index.shape != target.shape or index.is_floating_point():
        given = "nothing" if index is None else f"{tuple(index.shape)} {index.dtype}"
        raise LossplugError(
            f"training needs index, the number of each sample: integers {tuple(target.shape)}, got {given}", where=where
        )
    if index.device.type == "cpu" and index.numel() and int(index.max()) >= size:
        raise LossplugError(
            f"index {int(index.max())} is outside the {size} samples", where=where, remedy="Raise dataset_size"
        )
    return index.to(target.device)


class LabelError(LossplugError, IndexError):
    """A class index outside the classes."""


class Loss(nn.Module):
    """Any loss of the registry. ``reduction`` is ``none``, ``mean`` or ``sum``."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction


class ClassificationLoss(Loss, ABC):
    """A loss of logits and class indices (or, where ``accepts_soft``, class probabilities).

    Shapes: logits [N, C, *] as in ``torch.nn`` with targets [N, *]; or class last, [..., C] with targets [...]
    (the layout of language models); where both readings fit, ``torch.nn``'s is taken. Soft targets have the shape of
    the logits. Half-precision logits are upcast to float32, the result is float32, and autocast is off inside.

    Args:
        weight: Class weights [C], >= 0. ``mean`` then divides by the summed weights of the kept rows.
        ignore_index: Rows with this label contribute nothing (class-index targets only).
        reduction: ``none`` (shape of the targets, 0 at ignored positions), ``mean`` or ``sum``.
    """

    accepts_soft: ClassVar[bool] = False
    row_inputs: ClassVar[tuple[str, ...]] = ()  # keyword arguments of ``rows``: one value per row, shaped as the target

    weight: Tensor | None

    def __init__(
        self, weight: Tensor | list[float] | None = None, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(reduction)
        if weight is not None:
            weight = torch.as_tensor(
                weight, dtype=torch.get_default_dtype() if not isinstance(weight, Tensor) else None
            )
            if weight.ndim != 1 or not bool((weight >= 0).all()):
                raise LossplugError("weight has to be one number >= 0 per class", where=type(self).__name__)
        # Not persistent: a class weight is a setting, and a checkpoint has to load whatever the setting.
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index

    @abstractmethod
    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """Returns the unweighted loss [R] of logits ``z`` [R, C] (float32 or float64) at labels ``y`` [R] in [0, C)."""

    def soft_rows(self, z: Tensor, q: Tensor) -> Tensor:
        """Returns the unweighted loss [R] against probabilities ``q`` [R, C]; only where ``accepts_soft``."""
        raise LossplugError(
            "takes class indices, the targets are class probabilities (mixup, or a teacher?)",
            where=type(self).__name__,
            remedy="Use a loss with a soft form: cross_entropy or poly_loss",
        )

    def kept(self, target: Tensor, ignore_index: int | None = None) -> Tensor:
        """Returns where class-index targets are not ignored, for losses that look at the batch as a whole."""
        return target != (self.ignore_index if ignore_index is None else ignore_index)

    def classes(self, z: Tensor) -> int:
        """Returns the number of classes of flat logits; the width, unless a loss says otherwise."""
        return z.shape[1]

    def weighted_rows(self, z: Tensor, y: Tensor, weight: Tensor | None, **row_inputs: Tensor) -> Tensor:
        """Row losses times the weight of their class; losses that weight every class override it."""
        rows = self.rows(z, y, **row_inputs)
        return rows if weight is None else rows * weight[y]

    def weighted_soft_rows(self, z: Tensor, q: Tensor, weight: Tensor | None) -> Tensor:
        """Soft-target row losses times the expected class weight."""
        rows = self.soft_rows(z, q)
        return rows if weight is None else rows * (q @ weight)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        reduction: str | None = None,
        **row_inputs: Tensor,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: [N, C, *] or [..., C].
            target: Class indices (integer) of shape [N, *] or [...], or probabilities of the shape of ``logits``.
            sample_weight: Weight of each row, shape of the index targets.
            denominator: What ``mean`` divides by instead of the summed weights.
            weight: Overrides the class weights of the module for this call.
            ignore_index: Overrides the module's for this call.
            reduction: Overrides the module's for this call.
            row_inputs: What the loss lists in ``row_inputs``, each of the shape of the index targets.

        Raises:
            LabelError: A label outside [0, C) (an ``IndexError``; checked on CPU, where it costs no synchronisation).
            LossplugError: Shapes or dtypes that don't fit.
        """
        unknown = sorted(set(row_inputs) - set(self.row_inputs))
        if unknown:
            raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {unknown[0]!r}")
        reduction = self.reduction if reduction is None else reduction
        check_reduction(reduction)
        ignore_index = self.ignore_index if ignore_index is None else ignore_index
        weight = self.weight if weight is None else weight
        soft = target.is_floating_point() and target.shape == logits.shape
        z, class_dim = flatten_logits(logits, target, soft, type(self).__name__)
        classes = self.classes(z)
        if weight is not None and weight.numel() != classes:
            raise LossplugError(
                f"weight has {weight.numel()} classes, the logits have {classes}", where=type(self).__name__
            )
        with torch.autocast(z.device.type, enabled=False):
            z = upcast(z)
            weight = None if weight is None else weight.to(z)
            scale = None if sample_weight is None else sample_weight.reshape(-1).to(z)
            if scale is not None and scale.numel() != z.shape[0]:
                raise LossplugError(
                    f"sample_weight has {scale.numel()} entries for {z.shape[0]} rows", where=type(self).__name__
                )
            if soft:
                q = target.movedim(class_dim, -1).reshape(z.shape).to(z)
                rows = self.weighted_soft_rows(z, q, weight)
                divisor: Tensor | None = None
            else:
                y = target.reshape(-1)
                check_labels(y, classes, ignore_index, type(self).__name__)
                keep = y != ignore_index
                y = torch.where(keep, y, 0).long()
                inputs = {name: value.reshape(-1) for name, value in row_inputs.items()}
                rows = torch.where(keep, self.weighted_rows(z, y, weight, **inputs), 0)
                kept = keep.to(z.dtype) if weight is None else torch.where(keep, weight[y], 0)
                divisor = (kept if scale is None else kept * scale).sum()
            if scale is not None:
                rows = rows * scale
            shape = target.movedim(class_dim, -1).shape[:-1] if soft else target.shape
            return reduce_rows(rows.reshape(shape), divisor, reduction, z, denominator)


class FusableLoss(ClassificationLoss):
    """A classification loss that sees the logits only through :class:`LogitStats`."""

    needs: frozenset[str] = frozenset()  # of {"sum", "sumsq"}, besides lse and target
    spherical: ClassVar[bool] = False  # ``from_stats`` leaves lse alone: the O(d^2) output layer can train it

    @abstractmethod
    def from_stats(self, stats: LogitStats) -> Tensor:
        """Returns the row losses [R] from the statistics, by differentiable operations."""

    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """Row losses through the statistics of materialised logits."""
        return self.from_stats(logit_stats(z, y, self.needs))

    def sum_weights(self, weight: Tensor | None) -> Tensor | None:
        """Returns the ``u`` [C] of the statistic ``sum`` under class weights; None: ones."""
        return None

    def weighted_from_stats(self, stats: LogitStats, y: Tensor, weight: Tensor | None) -> Tensor:
        """Row losses times the weight of their class; losses that weight every class override it."""
        rows = self.from_stats(stats)
        return rows if weight is None else rows * weight[y]


def flatten_logits(logits: Tensor, target: Tensor, soft: bool, name: str) -> tuple[Tensor, int]:
    """Returns logits as rows [R, C] and the dimension that held the classes.

    Raises:
        LossplugError: The shapes of logits and targets don't fit each other, or the dtype is wrong.
    """
    if not logits.is_floating_point():
        raise LossplugError(f"logits have dtype {logits.dtype}, expected a floating dtype", where=name)
    if logits.ndim == 0:
        raise LossplugError("logits are a scalar, expected [N, C, *] or [..., C]", where=name)
    if not soft and (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool):
        raise LossplugError(
            f"targets have dtype {target.dtype} and shape {tuple(target.shape)} for logits {tuple(logits.shape)}",
            where=name,
            remedy="Expected integer class indices, or probabilities of the shape of the logits",
        )
    if logits.ndim == 1:
        class_dim = 0
    elif soft or target.shape == (logits.shape[0], *logits.shape[2:]):
        class_dim = 1
    elif target.shape == logits.shape[:-1]:
        class_dim = logits.ndim - 1
    else:
        raise LossplugError(
            f"targets {tuple(target.shape)} don't fit logits {tuple(logits.shape)}",
            where=name,
            remedy="Expected targets [N, *] for logits [N, C, *], or [...] for [..., C]",
        )
    classes = logits.shape[class_dim]
    if classes == 0:
        raise LossplugError(f"logits {tuple(logits.shape)} have no classes", where=name)
    return logits.movedim(class_dim, -1).reshape(-1, classes), class_dim


def check_labels(y: Tensor, classes: int, ignore_index: int, name: str) -> None:
    """Raises :class:`LabelError` for a label outside [0, classes) that is not ``ignore_index`` (CPU, not compiled)."""
    if y.device.type != "cpu" or y.numel() == 0 or torch.compiler.is_compiling():
        return
    bad = ((y < 0) | (y >= classes)) & (y != ignore_index)
    if bool(bad.any()):
        value = int(y[bad][0])
        raise LabelError(
            f"label {value} is outside the {classes} classes [0, {classes})",
            where=name,
            remedy=f"Use labels below {classes}, or ignore_index={value} to leave such rows out",
        )
