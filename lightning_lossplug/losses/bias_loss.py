"""Bias loss: rows weigh by the variance of their last feature map."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import ClassificationLoss, check_parameter, upcast
from lightning_lossplug.losses.exchange import world_size
from lightning_lossplug.losses.stats import logit_stats
from lightning_lossplug.registry import register

Normalisation = Literal["local", "global"]


@register(
    "loss",
    "bias_loss",
    family="classification",
    paper="Bias Loss for Mobile Neural Networks",
    arxiv="2107.11170",
    signature="logits_index",
    needs=("features",),
    stateful=True,
    gather=True,
)
class BiasLoss(ClassificationLoss):
    r"""Bias loss :math:`l_i = (e^{\alpha v_i} - \beta)\, n_i` (arXiv 2107.11170).

    :math:`v_i` is the unbiased variance of the sample's features (the input of the last pooling), scaled to [0, 1];
    features give no gradient. Samples with rich features weigh more, those the network sees little in weigh less.

    When: compact convolutional networks.

    Args:
        alpha: Exponent.
        beta: In [0, 1), which keeps the weights positive; ``alpha = beta = 0`` is cross-entropy.
        normalisation: ``local``: by the range of the variances in the batch; ``global``: by the range over training
            so far, kept in buffers (over all ranks under ``torch.distributed``), fixed in eval mode. Before
            the first training batch ``global`` is ``local``.
        legacy: With ``global``, divide by the batch's range, as the official code does; weights may then exceed their
            bound.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out, of the ranges too.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    row_inputs = ("factor",)

    minimum: Tensor
    maximum: Tensor

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.3,
        normalisation: str = "local",
        legacy: bool = False,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(0 <= beta < 1, "bias_loss", "beta", beta, "[0, 1)")
        known = get_args(Normalisation)
        check_parameter(normalisation in known, "bias_loss", "normalisation", normalisation, "local or global")
        self.alpha, self.beta, self.normalisation, self.legacy = alpha, beta, normalisation, legacy
        self.register_buffer("minimum", torch.tensor(float("inf")))
        self.register_buffer("maximum", torch.tensor(float("-inf")))

    def forward(self, logits: Tensor, target: Tensor, *, features: Tensor | None = None, **options: Any) -> Tensor:
        """Computes the loss.

        Args:
            logits: [N, C].
            target: Class indices [N].
            features: [N, *], at least two numbers per sample.
            options: As in :meth:`ClassificationLoss.forward`.

        Raises:
            LossplugError: ``features`` are missing or don't fit.
        """
        if features is None:
            raise LossplugError(
                "needs features", where="bias_loss", remedy="Pass features=, the input of the last pooling"
            )
        if target.ndim != 1 or features.shape[:1] != target.shape or features[:1].numel() < 2 * len(features[:1]):
            raise LossplugError(
                f"features {tuple(features.shape)} and targets {tuple(target.shape)} don't fit",
                where="bias_loss",
                remedy="Expected features [N, *] with two numbers or more per sample, and class indices [N]",
            )
        keep = self.kept(target, options.get("ignore_index"))
        return super().forward(logits, target, factor=self.factors(features, keep), **options)

    def rows(self, z: Tensor, y: Tensor, *, factor: Tensor | None = None) -> Tensor:
        """Cross-entropy times the factors."""
        n = logit_stats(z, y).nll
        return n if factor is None else n * factor.to(n)

    @torch.no_grad()
    def factors(self, features: Tensor, keep: Tensor) -> Tensor:
        """Returns ``exp(alpha v) - beta`` [N], 0 where not kept."""
        f = features.detach().flatten(1)
        v = upcast(f).var(dim=1)
        # Padded, so that an empty batch has a range as well.
        low = F.pad(torch.where(keep, v, torch.inf), (0, 1), value=torch.inf).amin()
        high = F.pad(torch.where(keep, v, -torch.inf), (0, 1), value=-torch.inf).amax()
        batch_range = high - low
        if self.normalisation == "global":
            if self.training:
                self._widen(low.clone(), high.clone())
            seen = self.minimum <= self.maximum
            low, high = torch.where(seen, self.minimum.to(v), low), torch.where(seen, self.maximum.to(v), high)
        scale = batch_range if self.legacy and self.normalisation == "global" else high - low
        scaled = (v - low) / scale.clamp_min(1e-12)
        return torch.where(keep, (self.alpha * scaled).exp() - self.beta, 0)

    def _widen(self, low: Tensor, high: Tensor) -> None:
        if world_size() > 1:
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
        self.minimum.copy_(torch.minimum(self.minimum, low))
        self.maximum.copy_(torch.maximum(self.maximum, high))
