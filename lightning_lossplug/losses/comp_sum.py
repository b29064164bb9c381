"""The comp-sum family: logistic, generalised cross-entropy (GCE) and mean absolute error, one exponent apart."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_lossplug.losses.base import FusableLoss, check_parameter
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register


def comp_sum(n: Tensor, tau: float) -> Tensor:
    r"""Returns :math:`\Phi_\tau = (e^{(1-\tau) n} - 1) / (1 - \tau)` of the cross-entropy ``n``; ``n`` itself at 1.

    For ``tau < 1`` it grows exponentially. Above half the logarithm of the dtype's largest number it goes on as its
    tangent, with a warning (on CPU, where looking costs no synchronisation): values and squared gradients stay finite
    and such rows keep a gradient.
    """
    rate = 1 - tau
    if abs(rate) < 1e-6:
        return n
    exponent = rate * n
    if rate < 0:
        return torch.expm1(exponent) / rate
    limit = 44.0 if n.dtype == torch.float32 else 354.0
    if n.device.type == "cpu" and not torch.compiler.is_compiling() and bool((exponent.detach() > limit).any()):
        warnings.warn(f"comp_sum: (1 - tau) n exceeds {limit}, the loss goes on linearly there; raise tau")
    inside = exponent.clamp_max(limit)
    return (torch.expm1(inside) + inside.detach().exp() * (exponent - inside)) / rate


@register(
    "loss",
    "comp_sum",
    family="classification",
    paper="Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    arxiv="2304.07288",
    signature="logits_index",
    fusable=True,
)
class CompSum(FusableLoss):
    r"""Comp-sum loss (arXiv 2304.07288): :math:`l = \Phi_\tau\big(\sum_{k \ne y} e^{z_k - z_y}\big)`.

    :math:`\Phi_\tau(u) = ((1+u)^{1-\tau} - 1) / (1-\tau)`, hence ``expm1((1-tau) n) / (1-tau)`` of the cross-entropy
    ``n``, with gradient :math:`p_y^{\tau-1} (p - e_y)`. tau = 0 is the sum of exponentials, 1 cross-entropy, (1, 2)
    GCE with ``q = tau - 1``, 2 the mean absolute error. For tau > 1 the loss is at most ``1 / (tau - 1)``.

    When: to trade the fit of cross-entropy against robustness to wrong labels; larger tau is more robust and harder
    to optimise. Below 1 see :func:`comp_sum` for logits that overflow.

    Args:
        tau: Exponent >= 0.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        tau: float = 1.0,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(tau >= 0, "comp_sum", "tau", tau, ">= 0")
        self.tau = tau

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the cross-entropy of each row."""
        return comp_sum(stats.nll, self.tau)


@register(
    "loss",
    "gce",
    family="classification",
    paper="Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    arxiv="1805.07836",
    signature="logits_index",
    fusable=True,
)
class GCE(FusableLoss):
    r"""Generalised cross-entropy :math:`l = (1 - p_y^q) / q` (arXiv 1805.07836), optionally truncated.

    When: training on labels of which a part is wrong.

    Args:
        q: In (0, 1]; towards 0 cross-entropy, 1 the mean absolute error.
        k: In [0, 1). Rows with :math:`p_y \le k` cost the constant :math:`(1 - k^q) / q` and give no gradient; 0
            truncates nothing.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        q: float = 0.7,
        k: float = 0.0,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(0 < q <= 1, "gce", "q", q, "(0, 1]")
        check_parameter(0 <= k < 1, "gce", "k", k, "[0, 1)")
        self.q, self.k = q, k

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the cross-entropy of each row."""
        rows = comp_sum(stats.nll, 1 + self.q)
        return rows if self.k == 0 else rows.clamp_max((1 - self.k**self.q) / self.q)


@register(
    "loss",
    "mae",
    family="classification",
    paper="Robust Loss Functions under Label Noise for Deep Neural Networks",
    arxiv="1712.09482",
    signature="logits_index",
    fusable=True,
)
class MAE(FusableLoss):
    """Mean absolute error ``l = 1 - p_y``, half the L1 distance between softmax and one-hot label (arXiv 1712.09482).

    When: very noisy labels, usually together with an active loss (``active_passive``); alone it fits slowly.

    Args:
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the cross-entropy of each row."""
        return -torch.expm1(-stats.nll)
