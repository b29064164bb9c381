"""Exchange of per-row values between ranks, for losses whose state every rank has to hold alike."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Returns the number of ranks; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns each tensor with the rows of all ranks, in rank order; the tensors themselves on a single rank.

    Ranks may hold different numbers of rows, none included, but all of them have to call. Carries no gradient.

    Args:
        tensors: Tensors with the same number of rows [R, *].
    """
    ranks = world_size()
    if ranks == 1:
        return tensors
    first = tensors[0]
    size = torch.tensor([first.shape[0]], device=first.device)
    sizes = [torch.empty_like(size) for _ in range(ranks)]
    dist.all_gather(sizes, size)
    counts = [int(n) for n in torch.cat(sizes).tolist()]
    gathered = []
    for tensor in tensors:
        # all_gather wants equal shapes: pad to the longest rank, cut afterwards.
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]))
    return tuple(gathered)
