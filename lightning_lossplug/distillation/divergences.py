r"""Divergences between rows of logits, in log space; the building blocks of the losses.

``z_t`` are the teacher's logits, ``z_s`` the student's, :math:`p = \mathrm{softmax}(z_t/T)`,
:math:`q = \mathrm{softmax}(z_s/T)`, rows [R, C], results [R]. Gradients flow into both sides: detach what has to stay.
Logits of -inf (masked classes) contribute nothing where both sides have them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_probabilities(z: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns ``log softmax(z / T)``, finite also where a logit is -inf (so that 0 times it is 0)."""
    scaled = z if temperature == 1 else z / temperature
    return scaled.log_softmax(dim=-1).clamp(min=torch.finfo(z.dtype).min / 4)


def kl_of_logs(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Returns ``KL(a || b)`` [R] of log-probabilities."""
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)


def entropy_of_logs(log_a: Tensor) -> Tensor:
    """Returns the entropy [R] of log-probabilities."""
    return -(log_a.exp() * log_a).sum(dim=-1)


def mixture_of_logs(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Returns ``log(w a + (1 - w) b)`` for ``0 <= w <= 1``."""
    if weight in (0, 1):
        return log_a if weight == 1 else log_b
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def forward_kl(z_s: Tensor, z_t: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns ``KL(p || q)`` [R]: it covers the modes of the teacher."""
    return kl_of_logs(log_probabilities(z_t, temperature), log_probabilities(z_s, temperature))


def reverse_kl(z_s: Tensor, z_t: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns ``KL(q || p)`` [R]: it stays on modes of the teacher."""
    return kl_of_logs(log_probabilities(z_s, temperature), log_probabilities(z_t, temperature))


def jsd(z_s: Tensor, z_t: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    r"""Returns :math:`\beta KL(p\|m) + (1-\beta) KL(q\|m)` [R], :math:`m = \beta p + (1-\beta) q`.

    At ``beta`` 0 and 1, where this vanishes, ``KL(p || q)`` and ``KL(q || p)``, as in the literature: the limits of
    the divergence over ``beta`` and ``1 - beta``.
    """
    log_p, log_q = log_probabilities(z_t, temperature), log_probabilities(z_s, temperature)
    if beta in (0, 1):
        return kl_of_logs(log_p, log_q) if beta == 0 else kl_of_logs(log_q, log_p)
    log_m = mixture_of_logs(log_p, log_q, beta)
    return beta * kl_of_logs(log_p, log_m) + (1 - beta) * kl_of_logs(log_q, log_m)


def skew_kl(z_s: Tensor, z_t: Tensor, alpha: float = 0.1, temperature: float = 1.0) -> Tensor:
    """Returns ``KL(p || a p + (1 - a) q)`` [R]."""
    log_p, log_q = log_probabilities(z_t, temperature), log_probabilities(z_s, temperature)
    return kl_of_logs(log_p, mixture_of_logs(log_p, log_q, alpha))


def skew_reverse_kl(z_s: Tensor, z_t: Tensor, alpha: float = 0.1, temperature: float = 1.0) -> Tensor:
    """Returns ``KL(q || (1 - a) p + a q)`` [R]; its gradient stays bounded where ``p`` underflows."""
    log_p, log_q = log_probabilities(z_t, temperature), log_probabilities(z_s, temperature)
    return kl_of_logs(log_q, mixture_of_logs(log_q, log_p, alpha))
