"""Quantised embeddings for search that rank documents as the dense ones do."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.base import LogitLoss
from lightning_lossplug.distillation.divergences import log_probabilities
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.registry import register

Similarity = Literal["inner", "l2"]


@register(
    "loss",
    "distill_vq",
    family="distillation",
    paper="Distill-VQ: Learning Retrieval Oriented Vector Quantization By Distilling Knowledge from Dense Embeddings",
    aliases=("listnet",),
    signature="scores_teacher",
)
class DistillVQ(LogitLoss):
    r"""ListNet: :math:`-\sum_d \mathrm{softmax}(t)_d \log \mathrm{softmax}(s)_d` of scores of documents, per query.

    t are the dense embeddings' scores of a query against the batch's and further documents, s those of quantised ones
    (:class:`ProductQuantizer`, or the centroids of an inverted file); sum the loss over both, weighted. Its gradient
    is :math:`q - p`. Log-softmax takes the place of the released ``log(p + 1e-6)``.

    Use it to train codebooks without labels of relevance.

    Args:
        reduction: ``batchmean`` or ``none``.
    """

    def __init__(self, reduction: str = "batchmean") -> None:
        super().__init__(reduction)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Cross-entropy of each query."""
        return -(log_probabilities(z_t).exp() * log_probabilities(z_s)).sum(dim=1)


def scores(query: Tensor, documents: Tensor, similarity: Similarity = "inner") -> Tensor:
    """Returns the scores [Q, N] of documents [N, D]: inner products, or minus the squared distance."""
    check_choice("distill_vq", "similarity", similarity, get_args(Similarity))
    if similarity == "inner":
        return query @ documents.T
    return -(query.square().sum(dim=1)[:, None] - 2 * query @ documents.T + documents.square().sum(dim=1))


class ProductQuantizer(nn.Module):
    r"""Product quantisation with a learned rotation, trained through a soft choice of codes.

    A rotated embedding is cut into ``parts``; each is replaced by its nearest codeword. Forward is the hard choice;
    backward goes through the softmax of minus the squared distances (straight-through).

    Args:
        width: D, a multiple of ``parts``.
        parts: Sub-vectors.
        codes: Codewords per sub-vector.
        temperature: Of the softmax, > 0.
    """

    def __init__(self, width: int, parts: int = 8, codes: int = 256, temperature: float = 1.0) -> None:
        super().__init__()
        for name, value in {"parts": parts, "codes": codes}.items():
            check_number("distill_vq", name, value, least=1)
        if width % parts:
            raise LossplugError(f"width {width} is no multiple of {parts} parts", where="distill_vq")
        self.temperature = check_number("distill_vq", "temperature", temperature, above=0)
        self.parts = parts
        self.rotation = nn.Parameter(torch.eye(width))
        self.codebook = nn.Parameter(torch.randn(parts, codes, width // parts))

    def distances(self, x: Tensor) -> Tensor:
        """Returns the squared distances [N, parts, codes] of rotated embeddings to the codewords."""
        y = (x @ self.rotation).unflatten(1, (self.parts, -1))
        cross = torch.einsum("npd,pkd->npk", y, self.codebook)
        return y.square().sum(dim=2, keepdim=True) - 2 * cross + self.codebook.square().sum(dim=2)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the codes [N, parts] to store."""
        return self.distances(x).argmin(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the quantised embeddings [N, D], in the space of the given ones."""
        soft = (-self.distances(x) / self.temperature).softmax(dim=2)
        hard = F.one_hot(soft.argmax(dim=2), soft.shape[2]).to(soft)
        choice = hard + soft - soft.detach()
        return torch.einsum("npk,pkd->npd", choice, self.codebook).flatten(1) @ self.rotation.T
