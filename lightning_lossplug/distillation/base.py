"""What the distillation losses share: rows and masks, precision, reductions, refusals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.losses.checks import check_floating, check_number, upcast

REDUCTIONS = ("batchmean", "tokenmean", "pixelmean", "global_tokens", "none")


def check_reduction(where: str, reduction: str) -> str:
    """Returns ``reduction``, or raises unless it is one of :data:`REDUCTIONS`; ``mean`` is refused by name."""
    if reduction not in REDUCTIONS:
        remedy = suggestion(reduction, REDUCTIONS)
        if reduction == "mean":
            remedy = "Use 'batchmean' (sum over classes, mean over rows); 'mean' would also divide by the classes"
        raise LossplugError(f"reduction is {reduction!r}", where=where, remedy=remedy)
    return reduction


def check_temperature(where: str, value: float, name: str = "temperature") -> float:
    """Returns ``value``, or raises unless it is a finite number above 0."""
    return check_number(where, name, value, above=0)


class Rows(NamedTuple):
    """Logits as rows of classes, the ignored rows taken out.

    Args:
        logits: One tensor [R, C] per network, in float32 or float64.
        target: Class index of each row [R], or None.
        kept: Numbers of the kept rows among all; None: all are.
        shape: Shape of all rows.
    """

    logits: list[Tensor]
    target: Tensor | None
    kept: Tensor | None
    shape: torch.Size

    def spread(self, rows: Tensor) -> Tensor:
        """Returns row values in the shape of all rows, 0 where ignored."""
        if self.kept is None:
            return rows.reshape(self.shape)
        return rows.new_zeros(self.shape.numel()).index_copy(0, self.kept, rows).reshape(self.shape)


def to_rows(
    where: str,
    logits: Sequence[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    needs_target: bool = False,
    names: Sequence[str] = ("student", "teacher"),
) -> Rows:
    """Flattens the logits of two or more networks to rows and drops the masked ones.

    Args:
        where: Name of the loss, for messages.
        logits: One tensor per network, of one shape.
        target: Class indices in the shape of the rows; rows with ``ignore_index`` are dropped. Targets of another kind
            (probabilities) are passed over unless they are needed.
        mask: Rows to keep, bool, in the shape of the rows.
        class_dim: The dimension that holds the classes.
        ignore_index: Label of rows that are left out.
        needs_target: Whether the loss needs class indices.
        names: What to call the networks in messages.

    Raises:
        LossplugError: Different numbers of classes or rows, logits of another dtype, missing or soft targets.
    """
    check_floating(where, **{f"{name} logits": z for name, z in zip(names, logits, strict=False)})
    first = logits[0]
    for i, z in enumerate(logits):
        name = names[min(i, len(names) - 1)]
        if z.ndim < 2 or first.ndim < 2:
            raise LossplugError(f"the {name}'s logits have shape {tuple(z.shape)}, expected [N, C]", where=where)
        if z.shape[class_dim] != first.shape[class_dim]:
            word = "classes" if first.ndim == 2 else "classes or tokens (vocab_size; a tokenizer's length may differ)"
            raise LossplugError(
                f"the {names[0]} has {first.shape[class_dim]} {word}, the {name} has {z.shape[class_dim]}",
                where=where,
                remedy="Both need the same outputs",
            )
        if z.shape != first.shape:
            raise LossplugError(
                f"the {names[0]}'s logits have shape {tuple(first.shape)}, the {name}'s {tuple(z.shape)}", where=where
            )
    classes = first.shape[class_dim]
    flat = [z.movedim(class_dim, -1).reshape(-1, classes) for z in logits]
    shape = first.movedim(class_dim, -1).shape[:-1]
    indices = target is not None and not target.is_floating_point() and target.shape == shape
    if needs_target and not indices:
        given = "nothing" if target is None else f"{tuple(target.shape)} {target.dtype}"
        raise LossplugError(
            f"needs class indices of shape {tuple(shape)} as targets, got {given}",
            where=where,
            remedy="Give integer labels; mixed labels (mixup) don't say which class is the target",
        )
    y = target.reshape(-1) if indices and target is not None else None
    if mask is not None and mask.shape != shape:
        raise LossplugError(f"the mask has shape {tuple(mask.shape)}, the rows {tuple(shape)}", where=where)
    keep = None if mask is None else mask.reshape(-1).bool()
    if y is not None and (mask is not None or needs_target or len(shape) > 1 or _has(y, ignore_index)):
        valid = y != ignore_index
        keep = valid if keep is None else keep & valid
    kept = None
    if keep is not None:
        kept = torch.nonzero(keep).squeeze(1)
        flat = [z.index_select(0, kept) for z in flat]
        y = None if y is None else y.index_select(0, kept)
    if y is not None and y.device.type == "cpu" and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
        bad = int(y.min()) if int(y.min()) < 0 else int(y.max())
        raise LossplugError(f"label {bad} is outside the {classes} classes", where=where)
    return Rows([upcast(z) for z in flat], None if y is None else y.long(), kept, shape)


def _has(y: Tensor, value: int) -> bool:
    return y.device.type != "cpu" or bool((y == value).any())


def reduce_rows(
    where: str,
    rows: Tensor,
    batch: Rows,
    reduction: str,
    sample_weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Reduces row losses; a batch without a kept row gives a 0 that is still part of the graph.

    Raises:
        LossplugError: ``global_tokens`` without a denominator, or weights of another shape.
    """
    if sample_weight is not None:
        if sample_weight.shape != batch.shape:
            raise LossplugError(
                f"sample_weight has shape {tuple(sample_weight.shape)}, the rows {tuple(batch.shape)}", where=where
            )
        weight = sample_weight.reshape(-1).to(rows)
        rows = rows * (weight if batch.kept is None else weight.index_select(0, batch.kept))
    if reduction == "none":
        return batch.spread(rows)
    if reduction == "global_tokens" and denominator is None:
        raise LossplugError(
            "reduction='global_tokens' needs denominator: the valid tokens of the whole window over all ranks",
            where=where,
        )
    total = rows.sum() + batch.logits[0].sum() * 0 if rows.numel() == 0 else rows.sum()
    if denominator is not None:
        return total / denominator
    return total / max(rows.numel(), 1)


class DistillationLoss(nn.Module):
    """Any loss of the family: ``forward(student, teacher, ...)``. It may hold trainable parts (adapters, heads)."""

    needs_target: ClassVar[bool] = False


class LogitLoss(DistillationLoss, ABC):
    """A loss of student and teacher logits, computed in float32 whatever comes in; the teacher gets no gradient.

    Shapes: logits [N, C], or class last [..., C] (tokens); with ``reduction="pixelmean"`` [N, C, *]. Targets and masks
    have the shape of the rows; rows whose target is ``ignore_index`` contribute nothing.

    Args:
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean`` (each: sum over classes, mean over the kept rows),
            ``global_tokens`` (sum over rows / ``denominator``) or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.where = type(self).__name__
        self.reduction = check_reduction(self.where, reduction)
        self.ignore_index = ignore_index

    @abstractmethod
    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Returns the loss [R] of rows [R, C] at labels [R] (None where there are none)."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            student: Logits that get the gradient.
            teacher: Logits of the same shape.
            target: Class indices, for the losses that need them and for ``ignore_index``.
            mask: Rows to keep, bool.
            sample_weight: Factor of each row; the mean still divides by the number of kept rows.
            denominator: What the sum is divided by instead of the number of kept rows.
            reduction: Overrides the one of the object.

        Raises:
            LossplugError: Shapes that don't fit, missing targets.
        """
        how = self.reduction if reduction is None else check_reduction(self.where, reduction)
        with torch.autocast(student.device.type, enabled=False):
            batch = to_rows(
                self.where,
                (student, teacher.detach()),
                target,
                mask,
                class_dim=1 if how == "pixelmean" else -1,
                ignore_index=self.ignore_index,
                needs_target=self.needs_target,
            )
            rows = self.rows(batch.logits[0], batch.logits[1], batch.target)
            return reduce_rows(self.where, rows, batch, how, sample_weight, denominator)


class BatchLogitLoss(LogitLoss):
    """A logit loss that compares rows with each other: one number per batch, of the rows of this process."""

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """There are none: the loss is one number."""
        raise LossplugError("has no value per row", where=self.where, remedy="Use reduction='batchmean'")

    @abstractmethod
    def batch(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Returns the loss of the kept rows [R, C]."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss; weights of rows, ``denominator`` and ``reduction="none"`` have no meaning here.

        Raises:
            LossplugError: One of them was given, or shapes don't fit.
        """
        how = self.reduction if reduction is None else check_reduction(self.where, reduction)
        if how in ("none", "global_tokens") or sample_weight is not None or denominator is not None:
            raise LossplugError(
                "compares rows with each other, so it takes no row weights, denominator or reduction='none'",
                where=self.where,
            )
        with torch.autocast(student.device.type, enabled=False):
            batch = to_rows(
                self.where,
                (student, teacher.detach()),
                target,
                mask,
                class_dim=1 if how == "pixelmean" else -1,
                ignore_index=self.ignore_index,
                needs_target=self.needs_target,
            )
            if batch.logits[0].shape[0] == 0:
                return student.sum() * 0
            return self.batch(batch.logits[0], batch.logits[1], batch.target)


class FeatureLoss(DistillationLoss, ABC):
    """A loss of pairs of features (student, teacher), summed over the pairs; the teacher gets no gradient."""

    @abstractmethod
    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """Returns the loss of one pair, the ``position``-th."""

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """Computes the loss of one pair of features, or of several in the same order.

        Raises:
            LossplugError: Different numbers of features, or shapes that don't fit.
        """
        ours = [student] if isinstance(student, Tensor) else list(student)
        theirs = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        where = type(self).__name__
        if len(ours) != len(theirs) or not ours:
            raise LossplugError(f"{len(ours)} features of the student, {len(theirs)} of the teacher", where=where)
        for side in (*ours, *theirs):
            check_floating(where, features=side)
        with torch.autocast(ours[0].device.type, enabled=False):
            pairs = zip(ours, theirs, strict=True)
            return torch.stack([self.pair(upcast(s), upcast(t.detach()), i) for i, (s, t) in enumerate(pairs)]).sum()


class OnlineTerms(NamedTuple):
    """What an online method gives for one batch.

    Args:
        student: Distillation term of the student, added to its own loss.
        teachers: Distillation term of each teacher, added to its cross-entropy.
        logs: Detached numbers worth logging.
        learn: False (a bool tensor) when the teachers pause on this batch; None: they always learn.
    """

    student: Tensor
    teachers: tuple[Tensor, ...]
    logs: dict[str, Tensor]
    learn: Tensor | None = None


class OnlineLoss(DistillationLoss, ABC):
    """A loss of a student and one or more teachers that learn with it; each term differentiates its own network only.

    Shapes, masks and reductions as in :class:`LogitLoss`; the terms don't contain the networks' task losses.
    """

    single: ClassVar[bool] = False  # one teacher only

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.where = type(self).__name__
        self.reduction = check_reduction(self.where, reduction)
        self.ignore_index = ignore_index

    @abstractmethod
    def terms(self, logits: list[Tensor], y: Tensor | None) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        """Returns the loss [R] of each network (the student first), numbers to log, and whether the teachers learn."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | Sequence[Tensor],
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> OnlineTerms:
        """Computes the terms of all networks from one batch.

        Raises:
            LossplugError: Shapes that don't fit, missing targets, more teachers than the method takes.
        """
        how = self.reduction if reduction is None else check_reduction(self.where, reduction)
        teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        if not teachers or (self.single and len(teachers) > 1):
            raise LossplugError(f"{len(teachers)} teachers given, it takes one", where=self.where)
        with torch.autocast(student.device.type, enabled=False):
            batch = to_rows(
                self.where,
                (student, *teachers),
                target,
                mask,
                class_dim=1 if how == "pixelmean" else -1,
                ignore_index=self.ignore_index,
                needs_target=self.needs_target,
            )
            rows, logs, learn = self.terms(batch.logits, batch.target)
            first, *rest = [reduce_rows(self.where, r, batch, how, None, denominator) for r in rows]
        return OnlineTerms(first, tuple(rest), logs, learn)
