"""Divergence between the distributions of two linear heads, a student's and a frozen teacher's, without logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.fused.blocks import block_rows, capped
from lightning_lossplug.losses.fused.gradients import HeadGradients, narrowed, row_logits
from lightning_lossplug.losses.fused.linear import spread, whole
from lightning_lossplug.losses.fused.precision import product_dtype, statistics_dtype
from lightning_lossplug.losses.fused.rows import chunk_rows
from lightning_lossplug.losses.reduction import check_reduction

Kind = Literal["kl", "reverse_kl", "jsd"]
WHERE = "fused_linear_divergence"


class Head(NamedTuple):
    """One side: hidden states [R, D], classifier [V, D], bias [V], softcap, dtype of the products."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    dtype: torch.dtype


class Divergence(NamedTuple):
    """Which divergence: kind, mixing weight of ``jsd``, temperature, rows of a chunk."""

    kind: Kind
    beta: float
    temperature: float
    chunk: int


def divergence_rows(student: Tensor, teacher: Tensor, kind: Kind, beta: float) -> tuple[Tensor, Tensor]:
    """Returns the divergence of each row of logits [r, V] and its gradient by the student's logits [r, V]."""
    log_q, q = student.log_softmax(dim=1), student.softmax(dim=1)
    log_p, p = teacher.log_softmax(dim=1), teacher.softmax(dim=1)
    if kind == "kl":
        rows = _expect(p, log_p.sub_(log_q)).sum(dim=1)
        return rows, q.sub_(p)
    if kind == "reverse_kl":
        inner = log_q.sub_(log_p)
        terms = _expect(q, inner)
        rows = terms.sum(dim=1)
        return rows, terms.addcmul_(q, rows[:, None], value=-1)
    log_m = p.mul(beta).add_(q, alpha=1 - beta).log_()
    terms = _expect(q, log_q.sub_(log_m)).mul_(1 - beta)
    from_student = terms.sum(dim=1)
    rows = from_student + beta * _expect(p, log_p.sub_(log_m)).sum(dim=1)
    return rows, terms.addcmul_(q, from_student[:, None], value=-1)


def _expect(p: Tensor, values: Tensor) -> Tensor:
    """``p * values``, 0 where ``p`` is 0 (a class masked by a logit of -inf has an infinite log-probability)."""
    return torch.where(p > 0, p * values, 0)


def _walk(
    student: Head, teacher: Head, how: Divergence, scale: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, HeadGradients | None]:
    """Returns the divergence of each row, and the gradients of ``scale @ rows`` when a scale is given."""
    rows, classes = student.hidden.shape[0], student.weight.shape[0]
    exact = statistics_dtype(student.dtype)
    value = student.hidden.new_empty(rows, dtype=exact)
    w_s, w_t = narrowed(student.weight, student.dtype), narrowed(teacher.weight, teacher.dtype)
    gradients = None
    if scale is not None:
        gradients = HeadGradients(student.hidden, student.weight, w_s, student.bias, needed, student.dtype, None)
    z_s = student.hidden.new_empty((how.chunk, classes), dtype=student.dtype)
    z_t = student.hidden.new_empty((how.chunk, classes), dtype=teacher.dtype)
    step = max(1, block_rows(how.chunk, classes, z_s) // 2)
    for i in range(0, rows, how.chunk):
        part = slice(i, min(i + how.chunk, rows))
        a, b = z_s[: part.stop - i], z_t[: part.stop - i]
        row_logits(student.hidden[part].to(student.dtype), w_s, student.bias, a)
        row_logits(teacher.hidden[part].to(teacher.dtype), w_t, teacher.bias, b)
        for j in range(0, part.stop - i, step):
            block = slice(j, min(j + step, part.stop - i))
            s = capped(a[block].to(exact), student.softcap)
            t = capped(b[block].to(exact), teacher.softcap)
            found, slope = divergence_rows(s / how.temperature, t.div(how.temperature), how.kind, how.beta)
            value[i + block.start : i + block.stop] = found
            if gradients is not None and scale is not None:
                if student.softcap is not None:
                    slope.addcmul_(slope, s.div_(student.softcap).square_(), value=-1)
                if gradients.bias is not None:
                    gradients.bias += (scale[i + block.start : i + block.stop] / how.temperature) @ slope
                a[block] = slope
        if gradients is not None and scale is not None:
            gradients.add(part, a, scale=scale[part] / how.temperature)
    return value, gradients


class _DivergenceTotal(torch.autograd.Function):
    """Scalar ``scale @ rows``, its gradients formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student: Head,
        teacher: Head,
        how: Divergence,
        scale: Tensor,
    ) -> Tensor:
        rows, gradients = _walk(student, teacher, how, scale, ctx.needs_input_grad)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rest = (student.softcap, student.dtype, teacher, how, scale)
        ctx.gradients = None if gradients is None else gradients.finished(bias)
        return (rows.double() @ scale.double()).to(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden, weight, bias = ctx.saved_tensors
            softcap, dtype, teacher, how, scale = ctx.rest
            student = Head(hidden, weight, bias, softcap, dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                _, again = _walk(student, teacher, how, scale, ctx.needs_input_grad)
            gradients = again.finished(bias)  # type: ignore[union-attr]
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
        return (*gradients, None, None, None, None)


class _DivergenceRows(torch.autograd.Function):
    """Rows, with a backward that forms the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, student: Head, teacher: Head, how: Divergence
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rest = (student.softcap, student.dtype, teacher, how)
        return _walk(student, teacher, how, None, ())[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        softcap, dtype, teacher, how = ctx.rest
        with torch.autocast(hidden.device.type, enabled=False):
            student = Head(hidden, weight, bias, softcap, dtype)
            _, gradients = _walk(student, teacher, how, upstream, ctx.needs_input_grad)
        return (*gradients.finished(bias), None, None, None)  # type: ignore[union-attr]


@torch.compiler.disable
def fused_linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: Kind = "kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    t2_scale: bool = True,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    tile: int | None = None,
) -> Tensor:
    r"""Divergence of a student's distribution from a teacher's, both heads multiplied out a chunk of rows at a time.

    With ``p = softmax(z_t / T)`` of the teacher and ``q = softmax(z_s / T)`` of the student, per row:
    ``kl`` :math:`\sum p \log(p / q)`; ``reverse_kl`` :math:`\sum q \log(q / p)`; ``jsd``, with
    :math:`m = \beta p + (1 - \beta) q`, :math:`\beta \sum p \log(p / m) + (1 - \beta) \sum q \log(q / m)` (the
    generalised form of arXiv 2306.13649). The teacher gets no gradient. Precision as in
    :func:`lightning_lossplug.losses.fused.fused_linear`. A scalar's gradients are formed in the forward pass;
    ``reduction="none"`` forms the logits again in backward.

    Args:
        hidden: Input of the student's classifier, [..., D].
        weight: The student's classifier, [V, D].
        teacher_hidden: Input of the teacher's classifier, [..., D'].
        teacher_weight: The teacher's classifier, [V, D'].
        kind: ``kl``, ``reverse_kl`` or ``jsd``.
        beta: Weight of the teacher in the mixture of ``jsd``, in (0, 1).
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`, which keeps the size of the gradients.
        bias: [V].
        teacher_bias: [V].
        softcap: Of the student's logits; None: plain.
        teacher_softcap: Of the teacher's logits.
        mask: Rows to keep, bool, shape of the rows [...]; the others are dropped before any matrix product.
        sample_weight: Factor of each row, [...].
        reduction: ``none`` ([...], 0 where masked), ``sum``, or ``mean`` over the kept rows, by their summed weights.
        denominator: What ``mean`` divides by instead.
        tile: Rows of a chunk; None: chosen by the sizes.

    Raises:
        LossplugError: Different vocabularies, shapes that don't fit, or a value out of range.
    """
    check_reduction(reduction)
    weight, teacher_weight = whole(weight), whole(teacher_weight).detach()
    _check(hidden, weight, bias, "student")
    _check(teacher_hidden, teacher_weight, teacher_bias, "teacher")
    shape = hidden.shape[:-1]
    if weight.shape[0] != teacher_weight.shape[0]:
        raise LossplugError(
            f"the student's classifier has {weight.shape[0]} rows, the teacher's {teacher_weight.shape[0]}",
            where=WHERE,
            remedy="Both need the same vocabulary; pad or cut the larger classifier where the extra tokens are unused",
        )
    if kind not in get_args(Kind):
        raise LossplugError(f"kind is {kind!r}", where=WHERE, remedy=f"Use one of {', '.join(get_args(Kind))}")
    if kind == "jsd" and not 0 < beta < 1:
        raise LossplugError(
            f"beta is {beta}, allowed is (0, 1)", where=WHERE, remedy="Its limits are kl and reverse_kl"
        )
    for name, value in (("temperature", temperature), ("softcap", softcap), ("teacher_softcap", teacher_softcap)):
        if value is not None and not value > 0:
            raise LossplugError(f"{name} is {value}, allowed is > 0", where=WHERE)
    if tile is not None and tile < 1:
        raise LossplugError(f"tile is {tile}, allowed is >= 1", where=WHERE)
    for name, rows in (("teacher_hidden", teacher_hidden[..., 0]), ("mask", mask), ("sample_weight", sample_weight)):
        if rows is not None and rows.shape != shape:
            raise LossplugError(f"{name} has rows {tuple(rows.shape)}, the student {tuple(shape)}", where=WHERE)

    h, h_t = hidden.reshape(-1, hidden.shape[-1]), teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    kept = torch.arange(h.shape[0], device=h.device)
    if mask is not None:
        kept = torch.nonzero(mask.reshape(-1)).squeeze(1)
        h, h_t = h.index_select(0, kept), h_t.index_select(0, kept)
    dtype, teacher_dtype = product_dtype(hidden, weight), product_dtype(teacher_hidden, teacher_weight)
    exact = statistics_dtype(dtype)
    scale = h.new_ones(kept.numel(), dtype=exact)
    if sample_weight is not None:
        scale = sample_weight.reshape(-1)[kept].to(exact)
    divisor = torch.as_tensor(scale.sum() if denominator is None else denominator, device=h.device)
    if kept.numel() == 0:
        nothing = h.sum().to(exact) + weight[:0].sum().to(exact)
        return nothing + h.new_zeros(shape if reduction == "none" else (), dtype=exact)
    size = chunk_rows(kept.numel(), 2 * weight.shape[0], dtype.itemsize) if tile is None else tile
    how = Divergence(kind, beta, temperature, min(size, kept.numel()))
    student = Head(h.detach(), weight.detach(), None if bias is None else bias.detach(), softcap, dtype)
    teacher = Head(
        h_t, teacher_weight, None if teacher_bias is None else teacher_bias.detach(), teacher_softcap, teacher_dtype
    )
    factor = temperature**2 if t2_scale else 1.0
    with torch.autocast(h.device.type, enabled=False):
        if reduction == "none":
            rows = _DivergenceRows.apply(h, weight, bias, student, teacher, how)
            return spread(rows * (scale * factor), kept, shape)
        if reduction == "mean":
            scale = torch.where(divisor > 0, scale / torch.where(divisor > 0, divisor, 1), 0).to(exact)
        learned = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (h, weight, bias))
        if learned and not scale.requires_grad:
            return _DivergenceTotal.apply(h, weight, bias, student, teacher, how, scale * factor)
        return _DivergenceRows.apply(h, weight, bias, student, teacher, how) @ (scale * factor)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, side: str) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise LossplugError(
            f"hidden states {tuple(hidden.shape)} don't fit the weight {tuple(weight.shape)} of the {side}",
            where=WHERE,
            remedy="Expected hidden states [..., D] and a weight [V, D]",
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise LossplugError(
            f"the {side}'s bias has shape {tuple(bias.shape)}, expected [{weight.shape[0]}]", where=WHERE
        )
