"""First and second moments of a stream of vectors, in float64; their memory does not depend on the stream's length."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lossplug.errors import LossplugError


class Moments:
    r"""Count, sum and Gram matrix of vectors: :math:`n`, :math:`\sum x`, :math:`\sum x x^\top`.

    Sums are float64, since the channels of keys differ by orders of magnitude in size and a low-rank basis is read off
    the small ones, too.

    Args:
        width: Channels c of a vector.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.gram = torch.zeros(width, width, dtype=torch.float64)

    @property
    def width(self) -> int:
        """Channels of a vector."""
        return len(self.total)

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Adds vectors.

        Args:
            x: Vectors ``[..., c]``.
            valid: Which of them count, bool ``[...]``; None for all.

        Raises:
            LossplugError: A vector is not finite.
        """
        rows = (x.reshape(-1, x.shape[-1]) if valid is None else x[valid]).detach()
        # MPS has no float64
        rows = rows.cpu().double() if rows.device.type == "mps" else rows.double()
        total = rows.sum(0)
        if not bool(total.isfinite().all()):
            raise LossplugError("a vector is not finite", where="calibration", remedy="Check the model and its inputs")
        self.total = self.total.to(rows.device) + total
        self.gram = self.gram.to(rows.device).addmm_(rows.T, rows)
        self.count += len(rows)

    def add(self, other: Moments) -> None:
        """Adds the sums of another stream."""
        self.count += other.count
        self.total = self.total.to(other.total.device) + other.total
        self.gram = self.gram.to(other.gram.device) + other.gram

    def mean(self) -> Tensor:
        """Returns the mean, float64 ``[c]``."""
        return self.total / max(self.count, 1)

    def second(self, *, centred: bool) -> Tensor:
        """Returns ``E[x x^T]``, or the covariance if ``centred``; float64 ``[c, c]``."""
        second = self.gram / max(self.count, 1)
        if centred:
            second = second - torch.outer(self.mean(), self.mean())
        return (second + second.T) / 2

    def all_reduce(self) -> None:
        """Sums over all processes of the default group; does nothing outside one."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        count = torch.tensor(self.count, device=self.total.device)
        for part in (count, self.total, self.gram):
            dist.all_reduce(part)
        self.count = int(count)

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums."""
        return {"count": self.count, "total": self.total.cpu(), "gram": self.gram.cpu()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Moments:
        """Rebuilds what :meth:`state_dict` returned."""
        made = cls(len(state["total"]))
        made.count, made.total, made.gram = state["count"], state["total"].clone(), state["gram"].clone()
        return made
