"""Active passive loss: a normalised loss that fits plus one that is robust."""

from __future__ import annotations

from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import ClassificationLoss, FusableLoss, check_parameter
from lightning_lossplug.losses.comp_sum import GCE, MAE
from lightning_lossplug.losses.normalised import LOG_ZERO, NCE, NFL, NGCE, PAPER, RCE
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register


@register(
    "loss",
    "active_passive",
    family="classification",
    paper=PAPER,
    arxiv="2006.13554",
    aliases=("apl",),
    signature="logits_index",
    fusable=True,
)
class ActivePassive(FusableLoss):
    r"""Active passive loss :math:`\alpha\, l_{active} + \beta\, l_{passive}` (arXiv 2006.13554).

    The active part raises ``p_y``, the passive part also lowers the other probabilities; both tolerate symmetric label
    noise, and together they fit, which either alone does badly.

    When: training on labels with much noise.

    Args:
        active: ``nce``, ``nfl``, ``ngce`` or ``gce``; ``nfl`` and ``ngce`` need all logits and refuse a chunked head.
        passive: ``rce`` or ``mae``.
        alpha: Weight of the active part, >= 0.
        beta: Weight of the passive part, >= 0. Official (alpha, beta): CIFAR-10 (1, 1); CIFAR-100 (10, 0.1) with
            ``rce`` and (10, 1) with ``mae``.
        gamma: Exponent of ``nfl``.
        q: Exponent of ``ngce`` and ``gce``.
        A: Constant of ``rce``, below 0.
        detach_modulator: As in ``nfl``.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        active: str = "nce",
        passive: str = "rce",
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.5,
        q: float = 0.7,
        A: float = LOG_ZERO,
        detach_modulator: bool = False,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(alpha >= 0, "active_passive", "alpha", alpha, ">= 0")
        check_parameter(beta >= 0, "active_passive", "beta", beta, ">= 0")
        actives: dict[str, ClassificationLoss] = {
            "nce": NCE(),
            "nfl": NFL(gamma, detach_modulator),
            "ngce": NGCE(q),
            "gce": GCE(q),
        }
        passives: dict[str, FusableLoss] = {"rce": RCE(A), "mae": MAE()}
        check_parameter(active in actives, "active_passive", "active", active, "one of " + ", ".join(actives))
        check_parameter(passive in passives, "active_passive", "passive", passive, "one of " + ", ".join(passives))
        self.active, self.passive = actives[active], passives[passive]
        self.alpha, self.beta = alpha, beta
        self.needs = getattr(self.active, "needs", frozenset())

    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """Rows of materialised logits, for every pair."""
        return self.alpha * self.active.rows(z, y) + self.beta * self.passive.rows(z, y)

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the statistics.

        Raises:
            LossplugError: The active part needs all logits.
        """
        if not isinstance(self.active, FusableLoss):
            raise LossplugError(
                f"{type(self.active).__name__.lower()} needs all logits of a row",
                where="active_passive",
                remedy="On a chunked linear head use active='nce' or 'gce'",
            )
        return self.alpha * self.active.from_stats(stats) + self.beta * self.passive.from_stats(stats)
