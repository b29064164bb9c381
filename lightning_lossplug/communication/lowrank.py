"""A compressor that sends two thin factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.communication.base import Compressor, Draw, Message
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


def lowrank_factors(v: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns P ``[m, r]`` with orthonormal columns and Q = M^T P ``[n, r]``, M the tensor as ``[m, n]``.

    P spans the columns of M M^T M S for a normal random S: a sketch with one power iteration.
    """
    matrix = v.reshape(len(v), -1) if v.ndim else v.reshape(1, 1)
    rank = min(rank, *matrix.shape)
    sketch = torch.randn(matrix.shape[1], rank, generator=generator, device=v.device, dtype=v.dtype)
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ sketch).Q
        sketch = matrix.T @ basis
    return basis, sketch


def lowrank(v: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Projects the tensor, as a matrix of its first axis, on about its ``rank`` strongest directions."""
    basis, other = lowrank_factors(v, rank, generator)
    return (basis @ other.T).reshape(v.shape)


@register(
    "compressor",
    "lowrank",
    family="low rank",
    paper="PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
    arxiv="1905.13727",
)
class LowRank(Compressor):
    """Two factors per matrix; see :func:`lowrank`. A projection: contractive, how much depends on the data.

    Every rank projects on directions of its own, so that the rules of error feedback hold as for the others; PowerSGD
    itself (one basis for the sum of all ranks) ships with torch. Vectors travel uncompressed.

    Args:
        rank: Columns of the factors, >= 1.

    Raises:
        LossplugError: ``rank`` out of range.
    """

    name: ClassVar[str] = "lowrank"

    def __init__(self, rank: int = 2) -> None:
        self.rank = int(check_number(self.name, "rank", rank, least=1))

    def encode(self, v: Tensor, draw: Draw) -> Message:
        """Both factors."""
        return lowrank_factors(v, self.rank, draw.shared(v.device))

    def decode(self, message: Message, like: Tensor, draw: Draw) -> Tensor:
        """Their product."""
        return (message[0] @ message[1].T).reshape(like.shape)

    def message_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Both factors."""
        rows = shape[0] if shape else 1
        columns = math.prod(shape[1:])
        return min(self.rank, rows, columns) * (rows + columns) * itemsize

    def contraction(self, numel: int) -> None:
        """It depends on the data."""
        return
