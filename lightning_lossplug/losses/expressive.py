"""Expressive losses: one coefficient between adversarial and certified training."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.certified import MarginLoss, l1_norm, margin_cross_entropy
from lightning_lossplug.losses.checks import check_number, reduce_weighted
from lightning_lossplug.losses.interval import Channels, margin_bounds
from lightning_lossplug.losses.pgd import pgd
from lightning_lossplug.registry import register
from lightning_lossplug.schedules import AnySchedule, Progress

PAPER = "Expressive Losses for Verified Robustness via Convex Combinations"


class ExpressiveLoss(MarginLoss):
    """A loss of lower bounds m of the margins and adversarial margins a, both [N, C-1]: ``loss(m, a)``.

    ``alpha = 0`` is the adversarial loss, ``alpha = 1`` the IBP loss. ``loss.from_model(model, x, y)`` attacks and
    propagates by itself.

    Args:
        alpha: Coefficient in [0, 1].
        l1: Weight >= 0 of the L1 norm of the weights; only ``from_model`` adds it.
        eps: Radius of the box, see :class:`MarginLoss`.
        eps_schedule: Factor of ``eps`` over training.
        attack_eps_factor: Radius of the attack over that of the box, > 0.
        steps: Steps of the attack.
        step_size: Step of the attack in units of its radius, > 0.
        low: Smallest possible input.
        high: Largest possible input.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    key: ClassVar[str]

    def __init__(
        self,
        alpha: float,
        l1: float = 0.0,
        eps: Channels | None = None,
        eps_schedule: AnySchedule | None = None,
        attack_eps_factor: float = 1.0,
        steps: int = 8,
        step_size: float = 0.25,
        low: Channels | None = None,
        high: Channels | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(eps, eps_schedule, low, high, reduction)
        self.alpha = check_number(self.key, "alpha", alpha, least=0, most=1)
        self.l1 = check_number(self.key, "l1", l1, least=0)
        self.attack_eps_factor = check_number(self.key, "attack_eps_factor", attack_eps_factor, above=0)
        self.steps = int(check_number(self.key, "steps", steps, least=1))
        self.step_size = check_number(self.key, "step_size", step_size, above=0)

    def adversarial(self, point: Tensor | None) -> Tensor:
        """Returns the adversarial margins, which every expressive loss needs."""
        if point is None:
            raise LossplugError("needs the margins at the attack", where=self.key, remedy="Call loss(bounds, margins)")
        return point

    def from_model(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        progress: Progress | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of a network at inputs [N, C, *] and labels [N]: attack, bounds, loss, L1 term.

        Batch norm in training mode takes the statistics of the attacked inputs, for the bounds as well.

        Raises:
            LossplugError: ``eps`` is not set, or the network has a layer without interval bounds.
        """
        with torch.autocast(x.device.type, enabled=False):
            attacked = pgd(model, y, *self.box(x, progress, self.attack_eps_factor), self.steps, self.step_size)
            bounds, margins = margin_bounds(model, *self.box(x, progress), y, point=attacked)
            loss = self(bounds, margins, sample_weight=sample_weight, progress=progress)
            return loss + self.l1 * l1_norm(model) if self.l1 else loss


@register("loss", "cc_ibp", family="robustness", paper=PAPER, arxiv="2305.13991", signature="margin_bounds")
class CCIBP(ExpressiveLoss):
    r"""Certified cross-entropy at combined margins: :math:`\log(1 + \sum_k e^{-(\alpha m_k + (1-\alpha) a_k)})`.

    Bounds m and adversarial margins a [N, C-1]. Never above MTL-IBP with the same alpha. Use it for verified training
    where plain IBP costs too much clean accuracy (arXiv 2305.13991). The authors' alpha: 1e-2 for CIFAR-10 at 2/255
    (attack radius times 2.1, 8 steps of 0.25), 0.5 at 8/255 (1 step), 0.1 for MNIST at 0.1; ``l1`` 1e-7 to 1e-5.

    Args:
        alpha: Coefficient in [0, 1].
        l1: Weight >= 0 of the L1 norm, in ``from_model``.
        eps: Radius of the box, see :class:`MarginLoss`.
        eps_schedule: Factor of ``eps`` over training.
        attack_eps_factor: Radius of the attack over that of the box.
        steps: Steps of the attack.
        step_size: Step of the attack in units of its radius.
        low: Smallest possible input.
        high: Largest possible input.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    key = "cc_ibp"

    def __init__(
        self,
        alpha: float = 1e-2,
        l1: float = 0.0,
        eps: Channels | None = None,
        eps_schedule: AnySchedule | None = None,
        attack_eps_factor: float = 1.0,
        steps: int = 8,
        step_size: float = 0.25,
        low: Channels | None = None,
        high: Channels | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(alpha, l1, eps, eps_schedule, attack_eps_factor, steps, step_size, low, high, reduction)

    def rows(self, lower: Tensor, point: Tensor | None, progress: Progress | None) -> Tensor:
        """Cross-entropy of the combined margins."""
        return margin_cross_entropy(self.alpha * lower + (1 - self.alpha) * self.adversarial(point))


@register("loss", "mtl_ibp", family="robustness", paper=PAPER, arxiv="2305.13991", signature="margin_bounds")
class MTLIBP(ExpressiveLoss):
    r"""Weighted sum of the certified and the adversarial loss: :math:`\alpha L_{IBP} + (1-\alpha) L_{adv}`.

    Bounds m and adversarial margins a [N, C-1]. Use it as the first of the three to try (arXiv 2305.13991). The
    authors' alpha: 4e-3 for CIFAR-10 at 2/255 (attack radius times 2.1, 8 steps of 0.25), 0.5 at 8/255 (1 step), 1e-2
    for MNIST at 0.1; ``l1`` 1e-7 to 1e-5.

    Args:
        alpha: Coefficient in [0, 1].
        l1: Weight >= 0 of the L1 norm, in ``from_model``.
        eps: Radius of the box, see :class:`MarginLoss`.
        eps_schedule: Factor of ``eps`` over training.
        attack_eps_factor: Radius of the attack over that of the box.
        steps: Steps of the attack.
        step_size: Step of the attack in units of its radius.
        low: Smallest possible input.
        high: Largest possible input.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    key = "mtl_ibp"

    def __init__(
        self,
        alpha: float = 4e-3,
        l1: float = 0.0,
        eps: Channels | None = None,
        eps_schedule: AnySchedule | None = None,
        attack_eps_factor: float = 1.0,
        steps: int = 8,
        step_size: float = 0.25,
        low: Channels | None = None,
        high: Channels | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(alpha, l1, eps, eps_schedule, attack_eps_factor, steps, step_size, low, high, reduction)

    def rows(self, lower: Tensor, point: Tensor | None, progress: Progress | None) -> Tensor:
        """The weighted sum."""
        adversarial = margin_cross_entropy(self.adversarial(point))
        return self.alpha * margin_cross_entropy(lower) + (1 - self.alpha) * adversarial


@register("loss", "exp_ibp", family="robustness", paper=PAPER, arxiv="2305.13991", signature="margin_bounds")
class ExpIBP(ExpressiveLoss):
    r"""Geometric mean of the certified and the adversarial loss: :math:`L_{IBP}^\alpha L_{adv}^{1-\alpha}`.

    Bounds m and adversarial margins a [N, C-1]; never above MTL-IBP with the same alpha. As in the authors' code the
    powers are taken of batch means, which only has a ``mean``. Losses below 1e-12 count as that, so that the gradient
    stays finite. Use it beside MTL-IBP on larger data sets (arXiv 2305.13991). The authors' alpha: 9.5e-2 for CIFAR-10
    at 2/255 (attack radius times 2.1, 8 steps of 0.25), 0.5 at 8/255 (1 step); ``l1`` 1e-7 to 1e-5.

    Args:
        alpha: Coefficient in [0, 1].
        l1: Weight >= 0 of the L1 norm, in ``from_model``.
        per_sample: Powers of the loss of each sample, not of the batch means.
        eps: Radius of the box, see :class:`MarginLoss`.
        eps_schedule: Factor of ``eps`` over training.
        attack_eps_factor: Radius of the attack over that of the box.
        steps: Steps of the attack.
        step_size: Step of the attack in units of its radius.
        low: Smallest possible input.
        high: Largest possible input.
        reduction: ``mean``; with ``per_sample`` also ``none`` or ``sum``.
    """

    key = "exp_ibp"

    def __init__(
        self,
        alpha: float = 9.5e-2,
        l1: float = 0.0,
        per_sample: bool = False,
        eps: Channels | None = None,
        eps_schedule: AnySchedule | None = None,
        attack_eps_factor: float = 1.0,
        steps: int = 8,
        step_size: float = 0.25,
        low: Channels | None = None,
        high: Channels | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(alpha, l1, eps, eps_schedule, attack_eps_factor, steps, step_size, low, high, reduction)
        self.per_sample = per_sample
        self._check(reduction)

    def _check(self, reduction: str) -> None:
        if reduction != "mean" and not self.per_sample:
            raise LossplugError(
                f"reduction is {reduction!r}, batch means only have 'mean'",
                where="exp_ibp",
                remedy="Set per_sample=True",
            )

    def _power(self, certified: Tensor, adversarial: Tensor) -> Tensor:
        return certified.clamp_min(1e-12) ** self.alpha * adversarial.clamp_min(1e-12) ** (1 - self.alpha)

    def rows(self, lower: Tensor, point: Tensor | None, progress: Progress | None) -> Tensor:
        """The geometric mean of every sample."""
        return self._power(margin_cross_entropy(lower), margin_cross_entropy(self.adversarial(point)))

    def reduced(
        self,
        lower: Tensor,
        point: Tensor | None,
        weight: Tensor | None,
        reduction: str,
        denominator: Tensor | float | None,
        progress: Progress | None,
    ) -> Tensor:
        """The geometric mean of the batch means, or the reduced rows."""
        self._check(reduction)
        if self.per_sample:
            return super().reduced(lower, point, weight, reduction, denominator, progress)
        a = self.adversarial(point)
        certified = reduce_weighted(margin_cross_entropy(lower), weight, "mean", lower, denominator)
        adversarial = reduce_weighted(margin_cross_entropy(a), weight, "mean", a, denominator)
        kept = torch.as_tensor(float(len(lower)) if weight is None else weight.sum())
        return torch.where(kept > 0, self._power(certified, adversarial), 0 * (certified + adversarial))
