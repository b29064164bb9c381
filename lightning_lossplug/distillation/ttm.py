"""Matching a power-transformed teacher."""

from __future__ import annotations

from torch import Tensor

from lightning_lossplug.distillation.base import LogitLoss
from lightning_lossplug.distillation.divergences import kl_of_logs, log_probabilities
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register

PAPER = "Knowledge Distillation Based on Transformed Teacher Matching"


@register("loss", "ttm", family="distillation", paper=PAPER, arxiv="2402.11148", signature="logits_teacher")
class TTM(LogitLoss):
    r"""Transformed teacher matching: :math:`KL(\hat p \| q)`, :math:`\hat p_c = p_c^\gamma / \sum_k p_k^\gamma`.

    The student is not softened, and there is no :math:`T^2`: ``gamma`` is 1/T of the teacher alone.

    Use it with a weight of its own for each pair of networks (45 with gamma 0.1 in the paper's example).

    Args:
        gamma: Exponent in (0, 1].
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(self, gamma: float = 0.1, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__(reduction, ignore_index)
        self.gamma = check_number(type(self).__name__.lower(), "gamma", gamma, above=0, most=1)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row divergences."""
        return kl_of_logs(log_probabilities(self.gamma * z_t), log_probabilities(z_s))


@register("loss", "wttm", family="distillation", paper=PAPER, arxiv="2402.11148", signature="logits_teacher")
class WTTM(TTM):
    r"""Weighted transformed teacher matching: :math:`U\,KL(\hat p \| q)`, :math:`U = \sum_k p_k^\gamma`.

    ``U`` is between 1 and :math:`C^{1-\gamma}` and large where the teacher is unsure.

    Use it instead of ``ttm`` where samples differ in difficulty (weight 4 with gamma 0.2 in the paper's example).

    Args:
        gamma: Exponent in (0, 1].
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(self, gamma: float = 0.2, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__(gamma, reduction, ignore_index)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row divergences times U."""
        power = (self.gamma * log_probabilities(z_t)).logsumexp(dim=1).exp()
        return power * super().rows(z_s, z_t, y)
