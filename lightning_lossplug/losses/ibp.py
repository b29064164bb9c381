"""Interval bound propagation loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.certified import MarginLoss, margin_cross_entropy, scheduled
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.losses.interval import Channels, margin_bounds
from lightning_lossplug.registry import register
from lightning_lossplug.schedules import AnySchedule, Progress


@register(
    "loss",
    "ibp",
    family="robustness",
    paper="On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models",
    arxiv="1810.12715",
    signature="margin_bounds",
)
class IBP(MarginLoss):
    r"""Worst-case cross-entropy in a box around the input, from lower bounds m of the margins.

    ``loss(m)`` is :math:`\mathrm{IBP}(m) = \log(1 + \sum_k e^{-m_k})`, ``loss(m, a)`` with clean margins a is
    :math:`\kappa\,\mathrm{CE}(a) + (1-\kappa)\,\mathrm{IBP}(m)`; both are [N, C-1]. ``loss.from_model(model, x, y)``
    propagates the box itself. Ramp the radius up from 0, with kappa going from 1 to 0.5. Use it to train small networks
    whose robustness can be verified (arXiv 1810.12715).

    Args:
        eps: Radius of the box, see :class:`MarginLoss`.
        eps_schedule: Factor of ``eps`` over training.
        kappa: Weight in [0, 1] of the clean loss where clean margins are given; a number or a schedule.
        low: Smallest possible input.
        high: Largest possible input.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        eps: Channels | None = None,
        eps_schedule: AnySchedule | None = None,
        kappa: float | AnySchedule = 0.5,
        low: Channels | None = None,
        high: Channels | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(eps, eps_schedule, low, high, reduction)
        if isinstance(kappa, (int, float)):
            check_number("ibp", "kappa", kappa, least=0, most=1)
        self.kappa = kappa

    def rows(self, lower: Tensor, point: Tensor | None, progress: Progress | None) -> Tensor:
        """The certified term, mixed with the clean one where there is one."""
        certified = margin_cross_entropy(lower)
        if point is None:
            return certified
        kappa = scheduled(self.kappa, progress, "ibp")
        if not 0 <= kappa <= 1:
            raise LossplugError(f"the schedule of kappa reached {kappa}, allowed is [0, 1]", where="ibp")
        return kappa * margin_cross_entropy(point) + (1 - kappa) * certified

    def from_model(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        progress: Progress | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of a network at inputs [N, C, *] and labels [N], clean term included.

        Raises:
            LossplugError: ``eps`` is not set, or the network has a layer without interval bounds.
        """
        with torch.autocast(x.device.type, enabled=False):
            lower, upper = self.box(x, progress)
            bounds, clean = margin_bounds(model, lower, upper, y, point=x)
        return self(bounds, clean, sample_weight=sample_weight, progress=progress)
