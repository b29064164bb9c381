"""InfoNCE in tiles: exact, without the batch-by-batch matrix."""

from __future__ import annotations

from lightning_lossplug.losses.info_nce import INITIAL_LOGIT_SCALE, InfoNCE
from lightning_lossplug.registry import register


@register(
    "loss",
    "tiled_contrastive",
    family="metric",
    paper="Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss",
    arxiv="2410.17243",
    signature="paired_embeddings",
    gather=True,
    stateful=True,
    no_weight_decay=("logit_scale",),
)
class TiledContrastive(InfoNCE):
    r"""InfoNCE whose similarity matrix exists one tile at a time (arXiv 2410.17243), for very large batches.

    :math:`l = \frac1B \sum_i (\log \sum_j e^{x_{ij}} - x_{ii})`, :math:`x = t\,a b^T`, and its mean with the other
    direction: value and gradients are those of :class:`InfoNCE`. Forward keeps the log-sum-exp of every row and column
    while it passes over the tiles, backward recomputes each tile: memory is O(B D) plus one tile instead of O(B^2), for
    one more matrix product. With ``gather`` a rank holds the other modality of all ranks, O(N D), but only tiles of its
    rows.

    Args:
        row_tile: Rows of a tile, >= 1.
        col_tile: Columns of a tile, >= 1. 1024 to 8192 are good values for both.
        logit_scale: As :class:`InfoNCE`, like the rest.
        learnable: Whether ``logit_scale`` is a parameter.
        symmetric: Both directions.
        normalize: L2-normalise inside.
        gather: The other modality is that of all ranks.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        row_tile: int = 1024,
        col_tile: int = 1024,
        logit_scale: float = INITIAL_LOGIT_SCALE,
        learnable: bool = True,
        symmetric: bool = True,
        normalize: bool = True,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(logit_scale, learnable, symmetric, "tiled", row_tile, col_tile, normalize, gather, reduction)
