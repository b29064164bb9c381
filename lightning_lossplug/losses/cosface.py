"""CosFace: an additive cosine margin."""

from __future__ import annotations

from torch import Tensor

from lightning_lossplug.losses.angular import MarginHead
from lightning_lossplug.losses.embeddings import check_range
from lightning_lossplug.registry import register


@register(
    "loss",
    "cosface",
    family="metric",
    paper="CosFace: Large Margin Cosine Loss for Deep Face Recognition",
    arxiv="1801.09414",
    signature="embeddings_labels_head",
    gather=False,
    needs=("num_classes", "embedding_size"),
)
class CosFace(MarginHead):
    r"""Cross-entropy of :math:`s (\cos\theta_y - m)` against :math:`s \cos\theta_k` (arXiv 1801.09414).

    As ArcFace, with a margin that is the same at every angle: the steadier choice for noisy labels.

    Shapes: x [B, D] unnormalised, y [B] in [0, C); owns ``weight`` [C, D].

    Args:
        num_classes: C.
        embedding_size: D.
        m: Margin in [0, 2].
        s: Scale > 0.
        gather: Average over the rows of all ranks also where they have unequal batches.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m: float = 0.35,
        s: float = 64.0,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_size, s, gather, reduction)
        check_range("cosface", "m", m, "[0, 2]", 0 <= m <= 2)
        self.m = m

    def target_cosine(self, cosine: Tensor, norm: Tensor) -> Tensor:
        """Margin on the cosine."""
        return cosine - self.m
