"""Cross-entropy with a penalty on the log-partition, which language models call z-loss."""

from __future__ import annotations

from torch import Tensor

from lightning_lossplug.losses.base import FusableLoss, check_parameter
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register


@register(
    "loss",
    "lse_penalty",
    family="classification",
    paper="PaLM: Scaling Language Modeling with Pathways",
    arxiv="2204.02311",
    signature="logits_index",
    fusable=True,
)
class LSEPenalty(FusableLoss):
    r"""Cross-entropy plus :math:`\lambda\, \mathrm{lse}^2` of every kept row (arXiv 2204.02311; routers: 2202.08906).

    Holds ``lse = logsumexp(z)`` near zero, so that logits don't drift in low precision. Not the Z-loss of de Brebisson
    and Vincent, which is ``z_loss``.

    When: large language models and mixture-of-experts routers in bf16.

    Args:
        lambda_: Weight >= 0: 1e-4 for language models, 1e-3 for routers.
        weight: Class weights [C]; they multiply the whole row.
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        lambda_: float = 1e-4,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(lambda_ >= 0, "lse_penalty", "lambda", lambda_, ">= 0")
        self.lambda_ = lambda_

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the log-partition and the target logit."""
        return stats.nll + self.lambda_ * stats.lse.square()
