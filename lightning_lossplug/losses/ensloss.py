"""EnsLoss: random calibrated convex losses, a new one in every step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import check_parameter
from lightning_lossplug.losses.binary import BinaryLoss
from lightning_lossplug.registry import register


def inverse_box_cox(u: Tensor, lambda_: float) -> Tensor:
    """Returns ``max(1 + lambda u, 0)^(1 / lambda)``, ``e^u`` at 0; infinite for lambda < 0 where the base is 0."""
    if abs(lambda_) < 1e-6:
        return u.exp()
    return (1 + lambda_ * u).clamp_min(0) ** (1 / lambda_)


def loss_derivatives(margins: Tensor, draws: Tensor, clip: float = -1.0) -> Tensor:
    """Returns derivatives [B] of one convex calibrated loss at ``margins``, from positive random ``draws`` [B].

    Negative everywhere and, sorted, assigned so that the smallest margin has the steepest one; beyond margin 1 they
    are divided by the margin.
    """
    slopes = (-draws).clamp_min(clip).sort().values
    g = torch.empty_like(margins).scatter_(0, margins.argsort(), slopes.to(margins))
    return torch.where(margins > 1, g / margins.clamp_min(1), g) - 1e-6


@register(
    "loss",
    "ensloss",
    family="classification",
    paper="EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification",
    arxiv="2409.00908",
    signature="binary_logits",
    stateful=True,
)
class EnsLoss(BinaryLoss):
    r"""EnsLoss for two classes: :math:`l_i = g_i m_i` with random constants ``g`` and margins :math:`m = (2t-1) s`.

    Each call draws one derivative ``g_i < 0`` per sample of the batch, sorted like the margins, hence from a convex
    calibrated loss; ``g`` comes from standard normals through the inverse Box-Cox transform at a lambda redrawn every
    ``period`` epochs: call :meth:`advance_epoch` after each. The value may rise while training improves; watch the
    accuracy. In eval mode the loss is the logistic loss. lambda, epoch and random state are saved with the module.

    When: binary classifiers that overfit with any fixed loss. The paper defines no multi-class form.

    Args:
        period: Epochs between new values of lambda, >= 1.
        lambda_: The first lambda.
        lambda_range: New values are uniform in this interval.
        clip: Steepest derivative, below 0.
        seed: Of the module's own random numbers.
        ignore_index: Target of samples that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        period: int = 10,
        lambda_: float = 0.0,
        lambda_range: tuple[float, float] = (-1.0, 1.0),
        clip: float = -1.0,
        seed: int = 0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ignore_index, reduction)
        check_parameter(period >= 1, "ensloss", "period", period, ">= 1")
        check_parameter(clip < 0, "ensloss", "clip", clip, "< 0")
        ordered = len(lambda_range) == 2 and lambda_range[0] <= lambda_range[1]
        check_parameter(ordered, "ensloss", "lambda_range", lambda_range, "two numbers, the smaller first")
        self.period, self.lambda_, self.clip = period, lambda_, clip
        self.lambda_range = tuple(lambda_range)
        self.epoch = 0
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Computes the loss of logits [N] or [N, 1]; ``options`` as in :meth:`BinaryLoss.forward`.

        Raises:
            LossplugError: More than one logit per sample, or targets outside [0, 1].
        """
        if logits.ndim > 1 and logits.shape[1:].numel() != 1:
            raise LossplugError(
                f"logits {tuple(logits.shape)} have more than one score per sample",
                where="ensloss",
                remedy="The loss is binary: give one logit per sample, [N] or [N, 1]",
            )
        return super().forward(logits, target, **options)

    def elements(self, s: Tensor, t: Tensor) -> Tensor:
        """``g_i m_i`` in training, the logistic loss in eval mode."""
        margins = (2 * t - 1) * s
        if not self.training:
            return F.softplus(-margins)
        draws = inverse_box_cox(torch.randn(len(s), generator=self._generator), self.lambda_)
        return loss_derivatives(margins.detach(), draws.to(s.device), self.clip) * margins

    def advance_epoch(self) -> None:
        """Counts an epoch; after every ``period`` of them draws a new lambda."""
        self.epoch += 1
        if self.epoch % self.period == 0:
            low, high = self.lambda_range
            self.lambda_ = low + (high - low) * float(torch.rand((), generator=self._generator))

    def get_extra_state(self) -> dict[str, Any]:
        """Returns lambda, epoch and random state for the checkpoint."""
        return {"lambda": self.lambda_, "epoch": self.epoch, "generator": self._generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores :meth:`get_extra_state`."""
        self.lambda_, self.epoch = state["lambda"], state["epoch"]
        self._generator.set_state(state["generator"].cpu())
