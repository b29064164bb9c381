"""Adaptive multi-head contrastive learning: a base loss per projection head, each with its own temperatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.embeddings import check_embeddings, check_range, full_precision, upcast
from lightning_lossplug.registry import register, registry

BASES = ("nt_xent", "nt_xent_am", "info_nce")


@register(
    "loss",
    "amcl",
    family="metric",
    paper="Adaptive Multi-head Contrastive Learning",
    arxiv="2310.05615",
    signature="paired_embeddings",
    gather=True,
    stateful=True,
    needs=("embedding_size",),
)
class AMCL(Loss):
    r"""Sum over M projection heads of a contrastive loss with pair-dependent temperatures (arXiv 2310.05615).

    :math:`l = \sum_m l_{base}(h_m(a), h_m(b); 1/\tau_m) + R(\tau)`, for views that differ by several kinds of
    augmentation. The network that gives the temperatures and the regulariser :math:`R` of the paper were not found in
    a form to be sure of: both are passed in, and no parity is claimed. Without a regulariser, temperatures that are
    learnt grow without bound.

    Shapes: a, b [B, embedding_size], the output of the encoder; always a scalar unless ``none``, then [M, rows].

    Args:
        embedding_size: Width of a and b.
        n_heads: M >= 1; 4 to 8.
        projection_size: Width of the heads' outputs, >= 1. A head is Linear, ReLU, Linear.
        base: ``nt_xent``, ``nt_xent_am`` or ``info_nce``.
        base_parameters: Arguments of the base loss.
        temperature: A number > 0, or a callable (a module is trained with the loss) of the projected views
            [M, B, projection_size] that returns temperatures broadcastable to [M, rows, candidates] of the base loss.
        regulariser: Of the temperatures tensor; added to the loss.
        gather: As the base loss.
        reduction: ``none``, ``mean`` or ``sum``, of the base loss.
    """

    def __init__(
        self,
        embedding_size: int,
        n_heads: int = 4,
        projection_size: int = 128,
        base: str = "nt_xent",
        base_parameters: Mapping[str, Any] | None = None,
        temperature: float | Callable[[Tensor, Tensor], Tensor] = 0.1,
        regulariser: Callable[[Tensor], Tensor] | None = None,
        gather: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        check_range("amcl", "embedding_size", embedding_size, ">= 1", embedding_size >= 1)
        check_range("amcl", "n_heads", n_heads, ">= 1", n_heads >= 1)
        check_range("amcl", "projection_size", projection_size, ">= 1", projection_size >= 1)
        if base not in BASES:
            raise LossplugError(f"base is {base!r}", where="amcl", remedy=suggestion(str(base), BASES))
        if not callable(temperature):
            check_range("amcl", "temperature", temperature, "> 0", temperature > 0)
        if regulariser is not None and reduction == "none":
            raise LossplugError("a regulariser has no rows", where="amcl", remedy="Use reduction 'mean' or 'sum'")
        self.embedding_size, self.temperature, self.regulariser = embedding_size, temperature, regulariser
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(embedding_size, embedding_size), nn.ReLU(), nn.Linear(embedding_size, projection_size)
            )
            for _ in range(n_heads)
        )
        parameters = {**(base_parameters or {}), "gather": gather, "reduction": reduction}
        self.base = registry.create("loss", base, **parameters)
        self.base.requires_grad_(False)  # its own scale is never used

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the loss of encoder outputs ``a``, ``b`` [B, embedding_size]."""
        for x, name in ((a, "a"), (b, "b")):
            check_embeddings(x, "AMCL", name)
            if x.shape[1] != self.embedding_size:
                raise LossplugError(
                    f"{name} has width {x.shape[1]}, the heads expect {self.embedding_size}", where="AMCL"
                )
        # Outside full_precision: the heads are layers like any other, and autocast may hold for them.
        views = [torch.stack([self.project(head, x) for head in self.heads]) for x in (a, b)]
        with full_precision(a):
            u, v = upcast(views[0]), upcast(views[1])
            if callable(self.temperature):
                tau = self.temperature(u, v)
            else:
                tau = torch.full((), self.temperature, dtype=u.dtype, device=u.device)
            per_head = tau.expand(len(self.heads), *tau.shape[1:]) if tau.ndim else tau.expand(len(self.heads))
            losses = torch.stack([self.base(u[m], v[m], 1 / per_head[m]) for m in range(len(self.heads))])
            if self.reduction == "none":
                return losses
            return losses.sum() + (0 if self.regulariser is None else self.regulariser(tau))

    @staticmethod
    def project(head: nn.Module, x: Tensor) -> Tensor:
        """Runs a head on embeddings that may be of a lower precision than its weights."""
        return head(x.to(next(head.parameters()).dtype))
