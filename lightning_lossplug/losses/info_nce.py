"""InfoNCE, the loss of CLIP: match row i of one modality to row i of the other, in both directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.embeddings import EmbeddingLoss, check_range, full_precision
from lightning_lossplug.losses.ranks import gather_rows, logsumexp_ranks
from lightning_lossplug.losses.tiles import tiled_lse
from lightning_lossplug.registry import register

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


@register(
    "loss",
    "info_nce",
    family="metric",
    paper="Learning Transferable Visual Models From Natural Language Supervision",
    arxiv="2103.00020",
    aliases=("clip",),
    signature="paired_embeddings",
    gather=True,
    stateful=True,
    no_weight_decay=("logit_scale",),
)
class InfoNCE(EmbeddingLoss):
    r"""InfoNCE in both directions (arXiv 1807.03748, 2103.00020), for two modalities or two views.

    With :math:`X = t\, a b^T`: :math:`l = \frac12 (\mathrm{CE}(X, i) + \mathrm{CE}(X^T, i))`.

    Owns ``logit_scale``, the logarithm of :math:`t`, held at or below log 100 in training. With ``gather`` a rank
    computes its rows of a against the b of all ranks; for the other direction the column sums are merged over ranks,
    so only b is sent, and the matrix is formed once.

    Shapes: a, b [B, D]; ``none`` gives [B].

    Args:
        logit_scale: Initial :math:`\log t`, at most log 100.
        learnable: Whether ``logit_scale`` is a parameter. Turn it off where the model passes its own ``scale``.
        symmetric: Both directions; else only a against the rows of b.
        backend: ``dense``, or ``tiled``: the matrix is never formed (see :class:`TiledContrastive`).
        row_tile: Rows of a tile, >= 1; only ``tiled``.
        col_tile: Columns of a tile, >= 1; only ``tiled``.
        normalize: L2-normalise inside.
        gather: The other modality is that of all ranks.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    logit_scale: Tensor

    def __init__(
        self,
        logit_scale: float = INITIAL_LOGIT_SCALE,
        learnable: bool = True,
        symmetric: bool = True,
        backend: str = "dense",
        row_tile: int = 1024,
        col_tile: int = 1024,
        normalize: bool = True,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(normalize, gather, reduction)
        where = type(self).__name__
        check_range(where, "logit_scale", logit_scale, "<= log 100", logit_scale <= MAX_LOGIT_SCALE)
        check_range(where, "row_tile", row_tile, ">= 1", row_tile >= 1)
        check_range(where, "col_tile", col_tile, ">= 1", col_tile >= 1)
        if backend not in ("dense", "tiled"):
            raise LossplugError(f"backend is {backend!r}", where=where, remedy="Use 'dense' or 'tiled'")
        value = torch.tensor(float(logit_scale))
        if learnable:
            self.logit_scale = nn.Parameter(value)
        else:
            self.register_buffer("logit_scale", value)
        self.symmetric, self.backend = symmetric, backend
        self.row_tile, self.col_tile = row_tile, col_tile

    def forward(
        self, a: Tensor, b: Tensor, scale: Tensor | float | None = None, bias: Tensor | float | None = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            a: [B, D].
            b: [B, D].
            scale: :math:`t` itself, not its logarithm, instead of the module's; one value, or [B, B] (``dense``).
            bias: Added to the logits; one value cancels in the softmax, so only [B, B] makes sense (``dense``).
        """
        with full_precision(a):
            a, b = self.embed_pair(a, b)
            if scale is None:
                scale = self.temperature_scale()
            (all_b,), start = gather_rows(self.gather, b)
            own = slice(start, start + a.shape[0])
            if self.backend == "tiled":
                if (isinstance(bias, Tensor) and bias.numel() > 1) or (isinstance(scale, Tensor) and scale.numel() > 1):
                    raise LossplugError(
                        "scale and bias have to be single values", where="backend 'tiled'", remedy="Use backend='dense'"
                    )
                scale = torch.as_tensor(scale).to(a).reshape(())
                diagonal = scale * (a * b).sum(dim=1)
                rows, columns = tiled_lse(a, all_b, scale, self.row_tile, self.col_tile, self.symmetric)
            else:
                logits = scale * (a @ all_b.T)
                logits = logits if bias is None else logits + bias
                diagonal = logits.diagonal(start)
                rows = logits.logsumexp(dim=1)
                columns = logits.logsumexp(dim=0) if self.symmetric else None
            loss = rows - diagonal
            if columns is not None:
                columns = logsumexp_ranks(self.gather, columns)[own]
                loss = (loss + columns - diagonal) / 2
            return self.reduce(loss, None, all_b)

    def temperature_scale(self) -> Tensor:
        """Returns :math:`t`, with its logarithm held below log 100."""
        if self.training and self.logit_scale.requires_grad:
            # In place rather than a clamp in the graph: past the bound that would cut the gradient for good.
            with torch.no_grad():
                self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return self.logit_scale.exp()
