"""Tensors next to sharded weights (FSDP2): masks are kept whole, in bits, weights and scales as DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tells whether a tensor is a DTensor, without importing ``torch.distributed`` in a process that has none."""
    return hasattr(tensor, "_local_tensor")


def in_tensor_parallel(tensor: Tensor) -> bool:
    """Tells whether products read a tensor as a DTensor: its mesh has an axis of tensor parallelism.

    By the names that Lightning and PyTorch's examples give such an axis; FSDP2 hands a plain tensor to the product.
    """
    if not is_sharded(tensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()  # type: ignore[attr-defined]
    return any(name in ("tensor_parallel", "tp") for name in names)


def full(weight: Tensor) -> Tensor:
    """Returns the whole weight, gathered when it is sharded; detached."""
    return weight.detach().full_tensor() if is_sharded(weight) else weight.detach()  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor, a view of it."""
    return getattr(tensor, "_local_tensor", tensor)


def shard_like(mask: Tensor, weight: Tensor) -> Tensor:
    """Returns this rank's part of a whole mask, as the weight is sharded; every rank holds the same mask."""
    return local(distribute_like(mask, weight))


def distribute_like(mask: Tensor, weight: Tensor) -> Tensor:
    """Returns a whole mask as the weight is: a DTensor with its placements when that is sharded."""
    if not is_sharded(weight):
        return mask
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, weight.device_mesh, weight.placements, src_data_rank=None)  # type: ignore[attr-defined]


def joint_norm(parts: Sequence[Tensor], homes: Sequence[Tensor]) -> Tensor:
    """Returns the L2 norm of all entries of some tensors together, at least in float32; the same on every rank.

    Args:
        parts: What this rank has of each tensor, at least one.
        homes: For each a tensor that is sharded as it is, such as its parameter; all ranks have to call this then.
    """
    norms: dict[tuple[Any, ...], list[Tensor]] = {}
    for part, home in zip(parts, homes, strict=True):
        # Norms of half-precision gradients overflow in their own type.
        norm = torch.linalg.vector_norm(part.to(torch.promote_types(part.dtype, torch.float32)))
        norms.setdefault(_groups(home), []).append(norm)
    totals = []
    for groups, found in norms.items():
        total = torch.linalg.vector_norm(torch.stack([n.to(found[0]) for n in found]))
        for group in groups:
            square = total.square()
            torch.distributed.all_reduce(square, group=group)
            total = square.sqrt()
        totals.append(total)
    return totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack([t.to(totals[0]) for t in totals]))


def _groups(tensor: Tensor) -> tuple[Any, ...]:
    """Groups of processes that have different parts of a tensor."""
    if not is_sharded(tensor):
        return ()
    mesh, places = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(i) for i, place in enumerate(places) if place.is_shard())
