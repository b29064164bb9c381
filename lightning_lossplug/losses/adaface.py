"""AdaFace: the kind of margin follows the quality of the image, read off the length of its embedding."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.losses.angular import MarginHead
from lightning_lossplug.losses.embeddings import check_range
from lightning_lossplug.losses.ranks import gather_rows
from lightning_lossplug.registry import register

EPS = 1e-3


@register(
    "loss",
    "adaface",
    family="metric",
    paper="AdaFace: Quality Adaptive Margin for Face Recognition",
    arxiv="2204.00964",
    signature="embeddings_labels_head",
    gather=True,
    stateful=True,
    needs=("num_classes", "embedding_size"),
)
class AdaFace(MarginHead):
    r"""Angular softmax head with a quality-adaptive margin (arXiv 2204.00964), for faces of mixed image quality.

    The length :math:`r` of an embedding, clipped to [0.001, 100] and detached, gives the quality
    :math:`q = \mathrm{clip}(h (r - \mu)/(\sigma + 10^{-3}), -1, 1)`; with :math:`\cos\theta` clipped to
    :math:`\pm(1 - 10^{-3})` the labelled logit is
    :math:`s (\cos(\mathrm{clip}(\theta - m q, 10^{-3}, \pi - 10^{-3})) - m - m q)`, the others :math:`s \cos\theta_k`.

    :math:`\mu, \sigma` are the buffers ``batch_mean`` (from 20) and ``batch_std`` (from 100), moved towards the
    statistics of the batch in training mode, before they are used. A batch of one has no standard deviation and
    leaves ``batch_std`` as it is.

    Shapes: x [B, D] unnormalised, y [B] in [0, C); owns ``weight`` [C, D].

    Args:
        num_classes: C.
        embedding_size: D.
        m: Margin in [0, 1]; 0.4.
        h: Concentration of the quality, >= 0; 0 is CosFace.
        s: Scale > 0.
        t_alpha: Step of the running statistics, (0, 1]; 1 uses those of the batch alone.
        gather: Statistics over the batches of all ranks.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    cosine_limit: ClassVar[float] = 1 - EPS

    batch_mean: Tensor
    batch_std: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m: float = 0.4,
        h: float = 0.333,
        s: float = 64.0,
        t_alpha: float = 0.01,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_size, s, gather, reduction)
        check_range("adaface", "m", m, "[0, 1]", 0 <= m <= 1)
        check_range("adaface", "h", h, ">= 0", h >= 0)
        check_range("adaface", "t_alpha", t_alpha, "(0, 1]", 0 < t_alpha <= 1)
        self.m, self.h, self.t_alpha = m, h, t_alpha
        self.register_buffer("batch_mean", torch.tensor(20.0))
        self.register_buffer("batch_std", torch.tensor(100.0))

    def target_cosine(self, cosine: Tensor, norm: Tensor) -> Tensor:
        """Angular and additive margin of each row by its quality."""
        norm = norm.clamp(0.001, 100)
        if self.training:
            self.update(norm)
        mean, std = self.batch_mean.to(norm), self.batch_std.to(norm)
        q = (self.h * (norm - mean) / (std + EPS)).clamp(-1, 1)
        theta = (cosine.acos() - self.m * q).clamp(EPS, math.pi - EPS)
        return theta.cos() - self.m - self.m * q

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """Moves the running statistics towards those of ``norm`` [B]."""
        norm = gather_rows(self.gather, norm)[0][0]
        if norm.numel() > 0:
            self.batch_mean.lerp_(norm.mean().to(self.batch_mean), self.t_alpha)
        if norm.numel() > 1:
            self.batch_std.lerp_(norm.std().to(self.batch_std), self.t_alpha)
