"""Tensors next to sharded weights (FSDP2): masks are kept whole, in bits, weights and scales as DTensors."""

from __future__ import annotations

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
