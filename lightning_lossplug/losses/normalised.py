"""Normalised losses: a row loss divided by its sum over all labels, and the reverse cross-entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lossplug.losses.base import ClassificationLoss, FusableLoss, check_parameter
from lightning_lossplug.losses.focal import one_minus_power
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register

PAPER = "Normalized Loss Functions for Deep Learning with Noisy Labels"
LOG_ZERO = math.log(1e-4)  # what the papers' code puts for log 0 in the reverse cross-entropy
TINY = 1e-12  # a single class has a normaliser of 0


def normalise(losses: Tensor, y: Tensor) -> Tensor:
    """Returns ``losses[y] / sum_k losses[k]`` of each row, for the losses [R, C] of every label."""
    return losses.gather(1, y[:, None]).squeeze(1) / losses.sum(dim=1).clamp_min(TINY)


def all_nll(z: Tensor) -> Tensor:
    """Returns ``-log p_k >= 0`` for every class."""
    return (-z.log_softmax(dim=1)).clamp_min(0)


@register(
    "loss", "nce", family="classification", paper=PAPER, arxiv="2006.13554", signature="logits_index", fusable=True
)
class NCE(FusableLoss):
    r"""Normalised cross-entropy :math:`l = n / S`, :math:`S = \sum_k -\log p_k` (arXiv 2006.13554).

    When: wrong labels. In [0, 1]; robust to symmetric label noise, but alone it underfits, as S is at least
    ``C log C``: combine it with a passive loss in ``active_passive``.

    Args:
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    needs = frozenset({"sum"})

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows with ``S = C lse - sum z``."""
        return stats.nll / (stats.classes * stats.lse - stats.needed("sum")).clamp_min(TINY)


@register(
    "loss", "rce", family="classification", paper=PAPER, arxiv="2006.13554", signature="logits_index", fusable=True
)
class RCE(FusableLoss):
    """Reverse cross-entropy ``l = -A (1 - p_y)``: softmax and label change places, ``A`` stands for log 0.

    When: the passive part of ``active_passive`` and ``symmetric_ce``; it tolerates wrong labels.

    Args:
        A: Below 0; log 1e-4 in the official code (arXiv 1908.06112, 2006.13554).
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        A: float = LOG_ZERO,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(A < 0, "rce", "A", A, "< 0")
        self.A = A

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the cross-entropy of each row."""
        return self.A * torch.expm1(-stats.nll)


@register("loss", "nfl", family="classification", paper=PAPER, arxiv="2006.13554", signature="logits_index")
class NFL(ClassificationLoss):
    r"""Normalised focal loss :math:`l = (1-p_y)^\gamma n / \sum_k (1-p_k)^\gamma (-\log p_k)` (arXiv 2006.13554).

    When: as ``nce``, with easy rows weighing less.

    Args:
        gamma: Focusing exponent >= 0; 0 is ``nce``.
        detach_modulator: Take the factors ``(1-p)^gamma`` as constants in backward, as the official code does.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        gamma: float = 0.5,
        detach_modulator: bool = False,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(gamma >= 0, "nfl", "gamma", gamma, ">= 0")
        self.gamma, self.detach_modulator = gamma, detach_modulator

    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """Rows from the focal losses of all labels."""
        n = all_nll(z)
        modulator = one_minus_power(-torch.expm1(-n), self.gamma)
        return normalise((modulator.detach() if self.detach_modulator else modulator) * n, y)


@register("loss", "ngce", family="classification", paper=PAPER, arxiv="2006.13554", signature="logits_index")
class NGCE(ClassificationLoss):
    r"""Normalised GCE :math:`l = (1-p_y^q) / (C - \sum_k p_k^q)` (arXiv 2006.13554).

    When: as ``nce``; an active part that is already robust.

    Args:
        q: In (0, 1].
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        q: float = 0.7,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(0 < q <= 1, "ngce", "q", q, "(0, 1]")
        self.q = q

    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """Rows from the generalised cross-entropies of all labels."""
        return normalise(-torch.expm1(-self.q * all_nll(z)), y)


@register(
    "loss", "nmae", family="classification", paper=PAPER, arxiv="2006.13554", signature="logits_index", fusable=True
)
class NMAE(FusableLoss):
    """Normalised mean absolute error ``l = (1 - p_y) / (C - 1)`` (arXiv 2006.13554): ``mae`` scaled.

    When: comparisons with ``nce``; its gradient is ``C - 1`` times smaller than that of ``mae``.

    Args:
        legacy: Half of it, the constant of the official code.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        legacy: bool = False,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        self.legacy = legacy

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the cross-entropy of each row."""
        return -torch.expm1(-stats.nll) / ((2 if self.legacy else 1) * max(stats.classes - 1, 1))


@register(
    "loss", "nrce", family="classification", paper=PAPER, arxiv="2006.13554", signature="logits_index", fusable=True
)
class NRCE(FusableLoss):
    """Normalised reverse cross-entropy ``l = (1 - p_y) / (C - 1)`` (arXiv 2006.13554): ``A`` cancels.

    When: only to reproduce experiments that name it; the value is that of ``nmae``.

    Args:
        legacy: Multiply the reverse cross-entropy by ``(C - 1) / 4``, as the official code does by operator precedence.
        A: Below 0, only for ``legacy``.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        legacy: bool = False,
        A: float = LOG_ZERO,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(A < 0, "nrce", "A", A, "< 0")
        self.legacy, self.A = legacy, A

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the cross-entropy of each row."""
        others = max(stats.classes - 1, 1)
        return torch.expm1(-stats.nll) * (self.A * others / 4 if self.legacy else -1 / others)
