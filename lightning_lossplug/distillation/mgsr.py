"""Revision of what a language model wrote, at the level of tokens and of spans."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import DistillationLoss, LogitLoss, check_temperature
from lightning_lossplug.distillation.divergences import kl_of_logs, log_probabilities
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, check_same_shape, upcast
from lightning_lossplug.registry import register

PAPER = "Multi-Granularity Semantic Revision for Large Language Model Distillation"


def inside_quantiles(p: Tensor, lower: float, upper: float) -> Tensor:
    """Returns which classes [R, C] lie, sorted from likely to unlikely, between two quantiles of the mass.

    A class is inside when the mass down to it is above ``lower`` and the mass before it below ``upper``; the likeliest
    is always inside for ``lower`` 0, all are for 0 and 1.
    """
    ordered = p.sort(dim=1, descending=True)
    after = ordered.values.cumsum(dim=1)
    before = after - ordered.values
    rest = 1 - after
    keep = (after > lower) & ((before < upper) | (rest < 1e-12 if upper >= 1 else torch.zeros_like(before).bool()))
    return torch.zeros_like(keep).scatter(1, ordered.indices, keep)


@register("loss", "dac_kl", family="distillation", paper=PAPER, arxiv="2407.10068", signature="logits_teacher")
class DACKL(LogitLoss):
    r"""Clipped divergence: :math:`T^2 KL(p \| q)` over the classes between two quantiles of the teacher's mass.

    Both distributions are scaled to these classes (:func:`inside_quantiles`); the target is kept where there is one.
    In the paper a small network, of which no description was found, chooses the quantiles; here they are settings.
    0 and 1 are the plain divergence.

    Use it where a large vocabulary's tail drowns what matters, beside ``OnPolicy(corrections=1)``.

    Args:
        lower: Quantile in [0, 1) that is cut off at the likely end.
        upper: Quantile in (``lower``, 1] behind which the unlikely end is cut off.
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`; off, as usual for language models.
        reduction: ``tokenmean``, ``batchmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of tokens that are left out.
    """

    def __init__(
        self,
        lower: float = 0.0,
        upper: float = 0.95,
        temperature: float = 1.0,
        t2_scale: bool = False,
        reduction: str = "tokenmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        self.lower = check_number("dac_kl", "lower", lower, least=0, below=1)
        self.upper = check_number("dac_kl", "upper", upper, above=lower, most=1)
        self.temperature, self.t2_scale = check_temperature("dac_kl", temperature), t2_scale

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row divergences."""
        log_p, log_q = log_probabilities(z_t, self.temperature), log_probabilities(z_s, self.temperature)
        if (self.lower, self.upper) != (0, 1):
            keep = inside_quantiles(log_p.exp(), self.lower, self.upper)
            if y is not None:
                keep = keep.scatter(1, y[:, None], True)
            log_p, log_q = (log_probabilities(x.masked_fill(~keep, -torch.inf)) for x in (log_p, log_q))
        rows = kl_of_logs(log_p, log_q)
        return self.temperature**2 * rows if self.t2_scale else rows


@register("loss", "span", family="distillation", paper=PAPER, arxiv="2407.10068", signature="logits_teacher_spans")
class Span(DistillationLoss):
    r"""Span consistency: neighbouring tokens of a span should relate as the teacher's do.

    Mean over pairs (t, t + 1) inside a span of :math:`\|p_t \odot p_{t+1} - q_t \odot q_{t+1}\|_2^2` with the
    probabilities p of the teacher and q of the student. The paper's code was not found; squaring the distance is a
    choice made here.

    Use it with spans of a chunker (noun and verb phrases).
    """

    def forward(self, student: Tensor, teacher: Tensor, spans: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            student: Logits [N, L, V].
            teacher: The same.
            spans: Number of the span of each token [N, L]; below 0: in none.

        Raises:
            LossplugError: Shapes that don't fit.
        """
        check_same_shape("span", student=student, teacher=teacher)
        if student.ndim != 3 or spans.shape != student.shape[:2]:
            raise LossplugError(f"logits {tuple(student.shape)} and spans {tuple(spans.shape)} don't fit", where="span")
        inside = (spans[:, 1:] == spans[:, :-1]) & (spans[:, 1:] >= 0)
        with torch.autocast(student.device.type, enabled=False):
            q, p = upcast(student).softmax(dim=-1), upcast(teacher.detach()).softmax(dim=-1)
            ours, theirs = (x[:, 1:][inside] * x[:, :-1][inside] for x in (q, p))
            if not len(ours):
                return student.sum() * 0
            return (ours - theirs).square().sum(dim=1).mean()
