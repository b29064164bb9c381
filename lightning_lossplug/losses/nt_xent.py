"""NT-Xent, the loss of SimCLR, and its additive-margin form."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.losses.angular import angular_margin
from lightning_lossplug.losses.embeddings import EmbeddingLoss, check_range, full_precision
from lightning_lossplug.losses.ranks import gather_rows
from lightning_lossplug.registry import register


@register(
    "loss",
    "nt_xent",
    family="metric",
    paper="A Simple Framework for Contrastive Learning of Visual Representations",
    arxiv="2002.05709",
    signature="paired_embeddings",
    gather=True,
)
class NTXent(EmbeddingLoss):
    r"""Cross-entropy that picks the other view of a sample among all views of the batch (arXiv 2002.05709).

    When: self-supervised pre-training on two views. With :math:`S = 1/T` and margin :math:`m` (0 is NT-Xent itself):
    :math:`l_i = -\log \frac{e^{S(s_{ip} - m)}}{e^{S(s_{ip} - m)} + \sum_{a \ne i,p} e^{S s_{ia}}}`.

    Shapes: a, b [B, D], two views of the same samples; ``none`` gives the rows of a, then those of b, [2B].

    Args:
        scale: :math:`S = 1/T > 0`.
        margin: :math:`m` in [0, 1); may be changed between steps by a schedule.
        angular: Take :math:`\cos(\theta + m)` instead of :math:`\cos\theta - m`; beyond :math:`\theta + m = \pi` it
            goes on as :math:`\cos\theta - m \sin m`, so that it keeps falling.
        symmetric: Both views are anchors, among all views; else only a, among the rows of b.
        normalize: L2-normalise inside.
        gather: Candidates are the batches of all ranks.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        scale: float = 30.0,
        margin: float = 0.0,
        angular: bool = False,
        symmetric: bool = True,
        normalize: bool = True,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(normalize, gather, reduction)
        check_range("nt_xent", "scale", scale, "> 0", scale > 0)
        check_range("nt_xent", "margin", margin, "[0, 1)", 0 <= margin < 1)
        self.scale, self.margin, self.angular, self.symmetric = scale, margin, angular, symmetric

    def forward(
        self, a: Tensor, b: Tensor, scale: Tensor | float | None = None, *, margin: Tensor | float | None = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            a: First view, [B, D].
            b: Second view, [B, D].
            scale: Overrides the module's; may be a tensor that is learnt, or one value per anchor and candidate
                ([2B, 2B], or [B, B] if not symmetric).
            margin: Overrides the module's; may be a tensor that is learnt.
        """
        scale = self.scale if scale is None else scale
        margin = self.margin if margin is None else margin
        with full_precision(a):
            a, b = self.embed_pair(a, b)
            (all_a, all_b), start = gather_rows(self.gather, a, b)
            own = torch.arange(start, start + a.shape[0], device=a.device)
            if self.symmetric:
                anchors, candidates = torch.cat([a, b]), torch.cat([all_a, all_b])
                other = torch.cat([own + all_a.shape[0], own])
                itself = torch.cat([own, own + all_a.shape[0]])
            else:
                anchors, candidates, other, itself = a, all_b, own, None
            cosine = anchors @ candidates.T
            hard = cosine.gather(1, other[:, None])
            hard = angular_margin(hard, margin) if self.angular else hard - margin
            logits = cosine.scatter(1, other[:, None], hard) * scale
            picked = logits.gather(1, other[:, None]).squeeze(1)
            if itself is not None:
                logits = logits.scatter(1, itself[:, None], -torch.inf)
            return self.reduce(logits.logsumexp(dim=1) - picked, None, candidates)


@register(
    "loss",
    "nt_xent_am",
    family="metric",
    paper="Additive Margin in Contrastive Self-Supervised Frameworks to Learn Discriminative Speaker Representations",
    arxiv="2404.14913",
    signature="paired_embeddings",
    gather=True,
)
class NTXentAM(NTXent):
    r"""NT-Xent whose positive pair is made harder by a margin (arXiv 2404.14913).

    :math:`l_i = -\log \frac{e^{S(s_{ip} - m)}}{e^{S(s_{ip} - m)} + \sum_{a \ne i,p} e^{S s_{ia}}}`. When: speaker and
    face verification. As :class:`NTXent`, with ``margin`` 0.1 by default.
    """

    def __init__(
        self,
        scale: float = 30.0,
        margin: float = 0.1,
        angular: bool = False,
        symmetric: bool = True,
        normalize: bool = True,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(scale, margin, angular, symmetric, normalize, gather, reduction)
