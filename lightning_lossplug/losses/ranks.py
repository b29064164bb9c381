"""Sums and concatenations over the ranks of a distributed run that gradients pass through.

Convention of every loss with ``gather``: rank ``r`` returns a value ``L_r`` such that the mean of ``L_r`` over ranks is
the loss of the concatenated batch, as a function of everything every rank holds. DDP averages gradients, so the
gradients are then those of the single-process loss on the concatenated batch, for ranks with unequal batches too.

Each function sends its messages in a fixed order inside one autograd node, forward and backward, so ranks can't wait
for each other crosswise. With ``gather=False``, or without an initialised default process group, nothing is sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size(gather: bool) -> int:
    """Returns the number of ranks a loss spans."""
    return dist.get_world_size() if gather and dist.is_available() and dist.is_initialized() else 1


def _concatenate(x: Tensor, sizes: list[int]) -> Tensor:
    # Every rank sends as many rows as the largest batch has: the collective wants equal shapes.
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: x.shape[0]] = x.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: list[int], start: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = slice(start, start + tensors[0].shape[0])
        out = tuple(_concatenate(x, sizes) for x in tensors)
        ctx.mark_non_differentiable(*(x for x in out if not x.is_floating_point()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        back: list[Tensor | None] = []
        for grad, needed in zip(grads, ctx.needs_input_grad[2:], strict=True):
            if needed:
                grad = grad.contiguous().clone()
                dist.all_reduce(grad)
            back.append(grad[ctx.rows] if needed else None)
        return None, None, *back


def gather_rows(gather: bool, *tensors: Tensor) -> tuple[list[Tensor], int]:
    """Concatenates tensors over ranks along their first dimension.

    Args:
        gather: Whether to.
        tensors: Each [B, ...] with the same B; B may differ between ranks, the other dimensions may not.

    Returns:
        Tensors [sum of B, ...], in the order of the ranks, and the index of this rank's first row.
    """
    world = world_size(gather)
    if world == 1:
        return list(tensors), 0
    own = torch.tensor([tensors[0].shape[0]], device=tensors[0].device)
    counts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in torch.cat(counts).tolist()]
    start = sum(sizes[: dist.get_rank()])
    return list(_GatherRows.apply(sizes, start, *tensors)), start


class _SumRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def sum_ranks(gather: bool, x: Tensor) -> Tensor:
    """Returns the sum of ``x`` over ranks."""
    return x if world_size(gather) == 1 else _SumRanks.apply(x)


def logsumexp_ranks(gather: bool, x: Tensor) -> Tensor:
    """Returns ``log(sum over ranks of exp(x))``; ``-inf`` is an empty sum."""
    if world_size(gather) == 1:
        return x
    top = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    top = torch.where(top.isfinite(), top, 0)
    total = sum_ranks(gather, (x - top).exp())
    some = total > 0
    return torch.where(some, top + torch.where(some, total, 1).log(), -torch.inf)
