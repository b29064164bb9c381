"""Clusters as labels: views from the same cluster, and a gate that tells good pseudo-labels from bad ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import DistillationLoss
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register


def cluster_views(clusters: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns, for every sample, one drawn from its cluster [N] (itself, where it is alone): a view for DINO.

    Args:
        clusters: Number of the cluster of each sample [N].
        generator: Of the draw.
    """
    order = clusters.argsort(stable=True)
    counts = clusters.bincount()
    starts = counts.cumsum(0) - counts
    size, start = counts[clusters], starts[clusters]
    draw = torch.rand(len(clusters), generator=generator)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - starts[clusters[order]]
    other = (draw * (size - 1).clamp(min=1)).long()
    other = torch.where(size > 1, other + (other >= place), place)
    return order[start + other]


def loss_gate(losses: Tensor, steps: int = 50) -> Tensor:
    """Returns the probability [N] that each loss belongs to the lower one of two normal distributions fitted to them.

    Args:
        losses: One number per sample [N].
        steps: Of the fit (expectation maximisation).
    """
    x = losses.detach().double()
    spread = x.std(unbiased=False).clamp(min=1e-6)
    mean = torch.stack([x.quantile(0.1), x.quantile(0.9)])
    std, share = spread.repeat(2), torch.full((2,), 0.5, dtype=torch.float64, device=x.device)
    p = torch.full((len(x), 2), 0.5, dtype=torch.float64, device=x.device)
    for _ in range(steps):
        log = -0.5 * ((x[:, None] - mean) / std).square() - std.log() + share.clamp(min=1e-12).log()
        p = log.softmax(dim=1)
        total = p.sum(dim=0).clamp(min=1e-12)
        share, mean = total / len(x), (p * x[:, None]).sum(dim=0) / total
        std = ((p * (x[:, None] - mean).square()).sum(dim=0) / total).sqrt().clamp(min=1e-3 * spread)
    return p[:, mean.argmin()].to(losses)


@register(
    "loss",
    "ca_dino",
    family="distillation",
    paper="Cluster-aware DINO for self-supervised speaker verification (loss gate and label correction)",
    signature="logits_clusters_gate",
)
class GatedClusters(DistillationLoss):
    r"""Pseudo-label training with a loss gate: reliable samples learn their cluster, others what the model is sure of.

    Cross-entropy to the cluster where ``gate`` is above one half (:func:`loss_gate` of the last epoch's losses); for
    the others, where the model's top probability is above ``threshold``, cross-entropy to its own sharpened
    prediction; the rest don't count. The sharpening, the threshold and how the two are balanced were not found:
    they are choices made here. The stage before it is ``dino`` on views of :func:`cluster_views`.

    Use it after clustering the embeddings of a DINO run without labels.

    Args:
        threshold: In [0, 1), of the model's top probability.
        temperature: In (0, 1], of the sharpening.
    """

    def __init__(self, threshold: float = 0.5, temperature: float = 0.1) -> None:
        super().__init__()
        self.threshold = check_number("ca_dino", "threshold", threshold, least=0, below=1)
        self.temperature = check_number("ca_dino", "temperature", temperature, above=0, most=1)

    def forward(self, logits: Tensor, clusters: Tensor, gate: Tensor) -> Tensor:
        """Computes the loss of logits [N, C], clusters [N] and probabilities of being reliable [N]."""
        with torch.autocast(logits.device.type, enabled=False):
            z = upcast(logits)
            reliable = gate > 0.5
            own = F.cross_entropy(z, clusters, reduction="none")
            sure = (z.detach().softmax(dim=1).amax(dim=1) > self.threshold) & ~reliable
            sharp = (z.detach() / self.temperature).softmax(dim=1)
            corrected = F.cross_entropy(z, sharp, reduction="none")
            counts = (reliable | sure).sum().clamp(min=1)
            return (own * reliable + corrected * sure).sum() / counts
