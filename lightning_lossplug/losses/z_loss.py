"""The Z-loss of de Brebisson and Vincent: softplus of the standardised target logit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.losses.base import FusableLoss, check_parameter
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register


@register(
    "loss",
    "z_loss",
    family="classification",
    paper="The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
    arxiv="1604.08859",
    signature="logits_index",
    fusable=True,
)
class ZLoss(FusableLoss):
    r"""Z-loss :math:`l = \frac1a \mathrm{softplus}\big(a (b - \frac{z_y - \mu}{\sigma})\big)` (arXiv 1604.08859).

    :math:`\mu, \sigma` are mean and population standard deviation of the row's logits. Shifting or scaling the logits
    changes nothing, so the outputs are scores, not probabilities (rank or calibrate them), the weight norm drifts (use
    weight decay), and the gradient grows as 1/sigma: don't start from a zero-initialised head. Not the log-partition
    penalty that language models call z-loss, see ``lse_penalty``.

    When: very many classes with ``spherical_output_layer``, whose cost doesn't depend on their number.

    Args:
        a: Sharpness > 0; smaller favours top-k.
        b: Standardised logit at which the penalty fades; larger favours top-1. At most ``sqrt(C - 1)`` is reachable.
            The paper tunes both; the defaults are those of its example program.
        eps: Added to the variance, > 0.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    needs = frozenset({"sum", "sumsq"})
    spherical = True

    def __init__(
        self,
        a: float = 1.0,
        b: float = 0.0,
        eps: float = 1e-12,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(a > 0, "z_loss", "a", a, "> 0")
        check_parameter(eps > 0, "z_loss", "eps", eps, "> 0")
        self.a, self.b, self.eps = a, b, eps

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Rows from the sums; loses digits where the mean is much larger than the spread."""
        mean = stats.needed("sum") / stats.classes
        variance = (stats.needed("sumsq") / stats.classes - mean**2).clamp_min(0)
        return self._from_moments(stats.target - mean, variance)

    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """Rows of materialised logits, with the two-pass variance."""
        centred = z - z.mean(dim=1, keepdim=True)
        return self._from_moments(centred.gather(1, y[:, None]).squeeze(1), centred.square().mean(dim=1))

    def _from_moments(self, deviation: Tensor, variance: Tensor) -> Tensor:
        score = deviation / torch.sqrt(variance + self.eps)
        return F.softplus(self.a * (self.b - score)) / self.a
