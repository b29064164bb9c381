"""Other divergences between teacher and student: alpha-beta, adaptive, symmetric, total variation."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import LogitLoss, check_temperature
from lightning_lossplug.distillation.divergences import forward_kl, kl_of_logs, log_probabilities, reverse_kl
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


class _Tempered(LogitLoss):
    def __init__(self, temperature: float, t2_scale: bool, reduction: str, ignore_index: int) -> None:
        super().__init__(reduction, ignore_index)
        self.temperature = check_temperature(type(self).__name__.lower(), temperature)
        self.t2_scale = t2_scale

    @property
    def scale(self) -> float:
        """The factor of the rows."""
        return self.temperature**2 if self.t2_scale else 1.0


@register(
    "loss",
    "abkd",
    family="distillation",
    paper="ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation",
    arxiv="2505.04560",
    signature="logits_teacher",
)
class ABKD(_Tempered):
    r"""Alpha-beta divergence of teacher p from student q.

    :math:`-\frac{1}{\alpha\beta} \sum_c [p^\alpha q^\beta - \frac{\alpha}{\alpha+\beta} p^{\alpha+\beta} -
    \frac{\beta}{\alpha+\beta} q^{\alpha+\beta}]`; by continuity (1, 0) is KL(p‖q), (0, 1) is KL(q‖p), (0.5, 0.5) is 4
    times the squared Hellinger distance.

    Use it to move between covering the teacher's modes and staying on them.

    Args:
        alpha: >= 0.
        beta: >= 0; not both 0.
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        temperature: float = 1.0,
        t2_scale: bool = True,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, t2_scale, reduction, ignore_index)
        self.alpha = check_number("abkd", "alpha", alpha, least=0)
        self.beta = check_number("abkd", "beta", beta, least=0)
        check_number("abkd", "alpha + beta", alpha + beta, above=0)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row divergences."""
        log_p, log_q = log_probabilities(z_t, self.temperature), log_probabilities(z_s, self.temperature)
        a, b = self.alpha, self.beta
        if b == 0 or a == 0:
            # a (or b) alone: the limit is KL of the powers, with their difference of mass.
            s = a + b
            one, other = (log_p, log_q) if b == 0 else (log_q, log_p)
            inner = (s * one).exp() * s * (one - other) - (s * one).exp() + (s * other).exp()
            return self.scale * inner.sum(dim=1) / s**2
        both = (a * log_p + b * log_q).exp()
        own = (a * ((a + b) * log_p).exp() + b * ((a + b) * log_q).exp()) / (a + b)
        return self.scale * (own - both).sum(dim=1) / (a * b)


@register(
    "loss",
    "akl",
    family="distillation",
    paper="Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    arxiv="2404.02657",
    signature="logits_teacher",
)
class AKL(_Tempered):
    r"""Adaptive KL: :math:`\frac{g_h}{g_h+g_l} KL(p\|q) + \frac{g_l}{g_h+g_l} KL(q\|p)`, per row.

    The head are the teacher's largest probabilities up to a mass of ``mu`` (the first always), the tail the rest;
    :math:`g` is the sum of :math:`|p - q|` in each, without a gradient.

    Use it for language models, in place of a fixed mix of both directions.

    Args:
        mu: Mass of the head in (0, 1).
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        mu: float = 0.5,
        temperature: float = 1.0,
        t2_scale: bool = True,
        reduction: str = "tokenmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, t2_scale, reduction, ignore_index)
        self.mu = check_number("akl", "mu", mu, above=0, below=1)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row divergences."""
        log_p, log_q = log_probabilities(z_t, self.temperature), log_probabilities(z_s, self.temperature)
        with torch.no_grad():
            p, order = log_p.exp().sort(dim=1, descending=True, stable=True)
            gap = (p - log_q.exp().gather(1, order)).abs()
            head = p.cumsum(dim=1) - p < self.mu  # the mass before an entry: the first is always in
            g_h, g_l = (gap * head).sum(dim=1), (gap * ~head).sum(dim=1)
            share = torch.where(g_h + g_l > 0, g_h / (g_h + g_l).clamp(min=torch.finfo(p.dtype).tiny), 0.5)
        return self.scale * (share * kl_of_logs(log_p, log_q) + (1 - share) * kl_of_logs(log_q, log_p))


@register(
    "loss",
    "jeffreys",
    family="distillation",
    paper="An invariant form for the prior probability in estimation problems (Jeffreys, 1946)",
    signature="logits_teacher",
)
class Jeffreys(_Tempered):
    r"""Symmetric divergence :math:`T^2 (KL(p\|q) + KL(q\|p))`.

    Use it as the plain case of ``bdkd``: both directions, no balance.

    Args:
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        t2_scale: bool = True,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, t2_scale, reduction, ignore_index)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row divergences."""
        t = self.temperature
        return self.scale * (forward_kl(z_s, z_t, t) + reverse_kl(z_s, z_t, t))


@register(
    "loss",
    "tvd",
    family="distillation",
    paper="f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    arxiv="2307.15190",
    signature="logits_teacher",
)
class TVD(_Tempered):
    r"""Total variation distance :math:`\tfrac12 \sum_c |p_c - q_c|`, in [0, 1].

    Use it where outliers of a KL disturb: every row is bounded.

    Args:
        temperature: T > 0 of both sides.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "tokenmean", ignore_index: int = -100) -> None:
        super().__init__(temperature, False, reduction, ignore_index)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row distances."""
        return ((z_t / self.temperature).softmax(dim=1) - (z_s / self.temperature).softmax(dim=1)).abs().sum(dim=1) / 2
