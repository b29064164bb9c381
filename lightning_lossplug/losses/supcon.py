"""Supervised contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.embeddings import (
    PairLoss,
    Pairs,
    check_range,
    check_sample_labels,
    full_precision,
    masked_logsumexp,
)
from lightning_lossplug.losses.ranks import gather_rows
from lightning_lossplug.registry import register


@register(
    "loss",
    "supcon",
    family="metric",
    paper="Supervised Contrastive Learning",
    arxiv="2004.11362",
    signature="embeddings_labels",
    gather=True,
)
class SupCon(PairLoss):
    r"""Supervised contrastive loss, sum over positives outside the logarithm (arXiv 2004.11362).

    For pre-training an encoder with class labels and one or more views per sample:
    :math:`l_i = -\frac{T}{T_b} \frac{1}{|P(i)|} \sum_{p \in P(i)} [s_{ip}/T - \log \sum_{a \neq i} e^{s_{ia}/T}]`.

    Shapes: x [B, D] or [B, views, D], y [B]; views are flattened sample by sample, so an anchor is row
    ``sample * views + view``. ``y=None`` makes every sample a class of its own (then more than one view is needed
    for a positive).

    Args:
        temperature: :math:`T > 0`.
        base_temperature: :math:`T_b > 0`.
        contrast_mode: ``all``: every view is an anchor; ``one``: only the first view of a sample.
        skip_empty: Leave anchors without positives out of the mean, instead of counting them as 0.
        normalize: L2-normalise x inside.
        gather: Candidates are the batches of all ranks.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        base_temperature: float = 0.07,
        contrast_mode: str = "all",
        skip_empty: bool = False,
        normalize: bool = True,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(normalize, gather, reduction)
        check_range("supcon", "temperature", temperature, "> 0", temperature > 0)
        check_range("supcon", "base_temperature", base_temperature, "> 0", base_temperature > 0)
        if contrast_mode not in ("all", "one"):
            raise LossplugError(f"contrast_mode is {contrast_mode!r}", where="supcon", remedy="Use 'all' or 'one'")
        self.temperature, self.base_temperature = temperature, base_temperature
        self.contrast_mode, self.skip_empty = contrast_mode, skip_empty

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        ref_x: Tensor | None = None,
        ref_y: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Flattens views, then as :meth:`PairLoss.forward`; ``indices_tuple`` counts flattened rows."""
        if x.ndim not in (2, 3):
            raise LossplugError(f"x has shape {tuple(x.shape)}, expected [B, D] or [B, views, D]", where="SupCon")
        views = x.shape[1] if x.ndim == 3 else 1
        if y is None:
            y = torch.arange(x.shape[0], device=x.device)
            y = y + gather_rows(self.gather, y)[1]
        check_sample_labels(y, x, "SupCon", "y")
        with full_precision(x):
            rows = self.embed(x.flatten(0, 1) if x.ndim == 3 else x, "x")
            stride = views if self.contrast_mode == "one" else 1
            return self.pair_loss(self.pairs(rows, y.repeat_interleave(views), ref_x, ref_y, indices_tuple, stride))

    def pair_loss(self, pairs: Pairs) -> Tensor:
        """Minus the mean log-probability of the positives."""
        s = pairs.similarity / self.temperature
        lse = masked_logsumexp(s, pairs.positive | pairs.negative)
        count = pairs.positive.sum(dim=1)
        mean = torch.where(pairs.positive, s, 0).sum(dim=1) / count.clamp_min(1)
        rows = (self.temperature / self.base_temperature) * torch.where(count > 0, lse - mean, 0)
        return self.reduce(rows, count > 0 if self.skip_empty else None, pairs.candidates)
