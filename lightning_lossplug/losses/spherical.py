"""Spherical and Taylor softmax: a positive quadratic in place of the exponential."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.losses.base import FusableLoss, check_parameter
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register

PAPER = "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family"


@register(
    "loss",
    "spherical_softmax",
    family="classification",
    paper=PAPER,
    arxiv="1511.05042",
    signature="logits_index",
    fusable=True,
)
class SphericalSoftmax(FusableLoss):
    r"""Negative log of the spherical softmax :math:`p_k = (o_k^2 + \epsilon) / \sum_j (o_j^2 + \epsilon)` (1511.05042).

    Even in every output: the largest ``o`` is not the likeliest class, predict with :meth:`predict_proba`.

    When: very many classes with ``spherical_output_layer``, or few classes as an alternative to softmax; worse than
    softmax on language models with large vocabularies.

    Args:
        eps: Above 0; at 0 the loss would be infinite at ``o_y = 0``.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    needs = frozenset({"sumsq"})
    spherical = True

    def __init__(
        self,
        eps: float = 1e-3,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(eps > 0, "spherical_softmax", "eps", eps, "> 0")
        self.eps = eps

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the target output and the sum of squares."""
        total = stats.needed("sumsq") + stats.classes * self.eps
        return total.log() - (stats.target.square() + self.eps).log()

    def predict_proba(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Returns the class probabilities along ``dim``."""
        mass = logits.square() + self.eps
        return mass / mass.sum(dim, keepdim=True)


@register(
    "loss",
    "taylor_softmax",
    family="classification",
    paper=PAPER,
    arxiv="1511.05042",
    signature="logits_index",
    fusable=True,
)
class TaylorSoftmax(FusableLoss):
    r"""Negative log of the Taylor softmax :math:`p_k \propto 1 + o_k + o_k^2 / 2` (arXiv 1511.05042).

    The exponential's series to second order, at least 1/2: smallest at ``o = -1``, so below it a smaller output is
    likelier again; predict with :meth:`predict_proba`.

    When: as ``spherical_softmax``; the better of the two around ``o = 0``, where it is softmax.

    Args:
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    needs = frozenset({"sum", "sumsq"})
    spherical = True

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the target output, the sum and the sum of squares."""
        total = stats.classes + stats.needed("sum") + stats.needed("sumsq") / 2
        return total.log() - torch.log1p(stats.target + stats.target.square() / 2)

    def predict_proba(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Returns the class probabilities along ``dim``."""
        mass = 1 + logits + logits.square() / 2
        return mass / mass.sum(dim, keepdim=True)
