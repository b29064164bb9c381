"""Whitening MSE: whiten sub-batches, then only pull positives together."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.embeddings import EmbeddingLoss, check_range, full_precision, l2_normalize
from lightning_lossplug.losses.ranks import gather_rows, world_size
from lightning_lossplug.registry import register


def whiten(x: Tensor, eps: float = 0.0) -> Tensor:
    """Centres and decorrelates each sub-batch of ``x`` [..., w, D] by the Cholesky factor of its covariance.

    Raises:
        LossplugError: The covariance isn't positive definite (w <= D, or embeddings that span fewer dimensions).
    """
    x = x - x.mean(dim=-2, keepdim=True)
    covariance = x.mT @ x / (x.shape[-2] - 1)
    covariance = (1 - eps) * covariance + eps * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    try:
        factor = torch.linalg.cholesky(covariance)
    except torch.linalg.LinAlgError:
        raise LossplugError(
            "the covariance of a sub-batch is singular, the embeddings span too few dimensions",
            where="w_mse",
            remedy="Raise w_size to at least twice the width, or set eps to 1e-4 or more",
        ) from None
    return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT


@register(
    "loss",
    "w_mse",
    family="metric",
    paper="Whitening for Self-Supervised Representation Learning",
    arxiv="2007.06346",
    signature="paired_embeddings",
    gather=True,
)
class WMSE(EmbeddingLoss):
    r"""Whitening MSE of two views (arXiv 2007.06346): pre-training without negatives, small widths (D = 64).

    A random partition of the batch into sub-batches of ``w_size``, the same for both views; each sub-batch of a view
    is centred and whitened by the Cholesky factor of :math:`(1-\epsilon) X^T X/(w-1) + \epsilon I`; then
    :math:`2 - 2\,\mathrm{mean} \cos(x, x')`. Averaged over ``w_iter`` partitions, drawn from torch's generator.

    Shapes: a, b [B, D] with B a multiple of ``w_size``. Always a scalar, in [0, 4].

    Args:
        w_size: Sub-batch size w, more than D (at least 2 D is advised) unless eps > 0.
        w_iter: Partitions, >= 1; 4 for large D.
        eps: Shrinkage in [0, 1); 1e-4 to 1e-3 where the encoder runs in half precision.
        normalize: Cosine of the whitened rows; else their plain mean squared error.
        gather: Sub-batches are drawn from the batches of all ranks; without it a rank whitens its own, which is
            also sound.
    """

    def __init__(
        self, w_size: int = 128, w_iter: int = 1, eps: float = 0.0, normalize: bool = True, gather: bool = False
    ) -> None:
        super().__init__(normalize=False, gather=gather)
        check_range("w_mse", "w_size", w_size, ">= 2", w_size >= 2)
        check_range("w_mse", "w_iter", w_iter, ">= 1", w_iter >= 1)
        check_range("w_mse", "eps", eps, "[0, 1)", 0 <= eps < 1)
        self.w_size, self.w_iter, self.eps, self.cosine = w_size, w_iter, eps, normalize

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the loss of two views ``a``, ``b`` [B, D].

        Raises:
            LossplugError: ``w_size`` doesn't divide B, doesn't exceed D, or a covariance is singular.
        """
        with full_precision(a):
            a, b = self.embed_pair(a, b)
            (a, b), _ = gather_rows(self.gather, a, b)
            rows, width = a.shape
            if rows == 0:
                return a.sum() + b.sum()
            if rows % self.w_size:
                raise LossplugError(
                    f"w_size {self.w_size} doesn't divide the batch of {rows}",
                    where="w_mse",
                    remedy="Choose a divisor, and drop_last=True in the data loader",
                )
            if self.eps == 0 and self.w_size <= width:
                raise LossplugError(
                    f"w_size {self.w_size} has to exceed the width {width}",
                    where="w_mse",
                    remedy="Raise it, or set eps > 0",
                )
            losses = [self.partition_loss(a, b, self.permutation(rows, a.device)) for _ in range(self.w_iter)]
            return torch.stack(losses).mean()

    def partition_loss(self, a: Tensor, b: Tensor, order: Tensor) -> Tensor:
        """Returns the loss of one partition."""
        a, b = (whiten(x[order].unflatten(0, (-1, self.w_size)), self.eps) for x in (a, b))
        if not self.cosine:
            return F.mse_loss(a, b)
        return 2 - 2 * (l2_normalize(a) * l2_normalize(b)).sum(dim=-1).mean()

    def permutation(self, rows: int, device: torch.device) -> Tensor:
        """Returns a random order, that of rank 0 on every rank."""
        order = torch.randperm(rows, device=device)
        if world_size(self.gather) > 1:
            dist.broadcast(order, 0)
        return order
