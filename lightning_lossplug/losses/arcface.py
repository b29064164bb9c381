"""ArcFace: an additive angular margin."""

from __future__ import annotations

from torch import Tensor

from lightning_lossplug.losses.angular import MarginHead, angular_margin
from lightning_lossplug.losses.embeddings import check_range
from lightning_lossplug.registry import register


@register(
    "loss",
    "arcface",
    family="metric",
    paper="ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
    arxiv="1801.07698",
    signature="embeddings_labels_head",
    gather=False,
    needs=("num_classes", "embedding_size"),
)
class ArcFace(MarginHead):
    r"""Cross-entropy of :math:`s \cos(\theta_y + m)` against :math:`s \cos\theta_k` (arXiv 1801.07698).

    The usual head for faces and fine-grained retrieval with many classes. Past :math:`\theta_y + m = \pi` the labelled
    cosine goes on as :math:`\cos\theta_y - m \sin m`.

    Shapes: x [B, D] unnormalised, y [B] in [0, C); owns ``weight`` [C, D].

    Args:
        num_classes: C.
        embedding_size: D.
        m: Margin in radians, [0, pi/2].
        s: Scale > 0.
        gather: Average over the rows of all ranks also where they have unequal batches.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m: float = 0.5,
        s: float = 64.0,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_size, s, gather, reduction)
        check_range("arcface", "m", m, "[0, pi/2]", 0 <= m <= 1.5708)
        self.m = m

    def target_cosine(self, cosine: Tensor, norm: Tensor) -> Tensor:
        """Margin on the angle."""
        return angular_margin(cosine, self.m)
