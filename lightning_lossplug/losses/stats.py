"""Per-row statistics of logits, from which a whole family of losses is computed.

Many classification losses depend on a row of logits ``z`` only through a few scalars: the log-partition
``lse = logsumexp(z)``, the target logit ``z_y``, the sum ``sum_k u_k z_k`` and the sum of squares. Their gradient is

    dl/dz = (dl/dlse) softmax(z) + (dl/dz_y) e_y + (dl/dsum) u + 2 (dl/dsumsq) z

so one backward serves them all, on materialised logits (here) and on a linear head whose logits are never formed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError


class LogitStats(NamedTuple):
    """Scalars of each of R rows of C logits.

    Args:
        lse: ``logsumexp(z)``, [R].
        target: ``z_y``, [R].
        classes: C.
        sum: ``sum_k u_k z_k`` with ``u`` the class weights or ones, [R]; only for a loss that asks for it.
        sumsq: ``sum_k z_k^2``, [R]; likewise.
    """

    lse: Tensor
    target: Tensor
    classes: int
    sum: Tensor | None = None
    sumsq: Tensor | None = None

    @property
    def nll(self) -> Tensor:
        """The cross-entropy ``n = lse - z_y`` of each row, >= 0 also where rounding would make it negative."""
        return (self.lse - self.target).clamp_min(0)

    def needed(self, name: Literal["sum", "sumsq"]) -> Tensor:
        """Returns an optional statistic; an error where it was not computed."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise LossplugError(
                f"the statistic {name!r} was not computed", remedy=f"Put {name!r} into the loss's needs"
            )
        return value


class _LogitStats(torch.autograd.Function):
    """Statistics with one C-wide buffer in backward, where autograd's own ops would need one per statistic."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, u: Tensor | None, need_sum: bool, need_sumsq: bool) -> tuple[Any, ...]:
        lse = z.logsumexp(dim=1)
        target = z.gather(1, y[:, None]).squeeze(1)
        total = None if not need_sum else z.sum(dim=1) if u is None else z @ u
        sumsq = torch.linalg.vecdot(z, z) if need_sumsq else None
        ctx.save_for_backward(z, y, u, lse)
        return lse, target, total, sumsq

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        z, y, u, lse = ctx.saved_tensors
        g_lse, g_target, g_sum, g_sumsq = (None if g is None else g[:, None] for g in grads)
        grad = (z - lse[:, None]).exp() * g_lse
        grad.scatter_add_(1, y[:, None], g_target)
        if g_sum is not None:
            grad = grad.add_(g_sum) if u is None else grad.addcmul_(g_sum, u)
        if g_sumsq is not None:
            grad = grad.addcmul_(g_sumsq, z, value=2)
        return grad, None, None, None, None


def logit_stats(z: Tensor, y: Tensor, needs: Collection[str] = (), u: Tensor | None = None) -> LogitStats:
    """Returns the statistics of logits ``z`` [R, C] at class indices ``y`` [R].

    Args:
        z: Logits, float32 or float64.
        y: Class indices in [0, C).
        needs: Which of ``sum`` and ``sumsq`` to compute besides ``lse`` and ``target``; each is a pass over ``z``.
        u: Weights [C] of the sum; None: ones.
    """
    lse, target, total, sumsq = _LogitStats.apply(z, y, u, "sum" in needs, "sumsq" in needs)
    return LogitStats(lse, target, z.shape[1], total, sumsq)
