"""Which samples an epoch visits, in which order, on which process: pure functions of (seed, epoch).

Nothing here draws from a global random generator, so an epoch that is begun again gives the same batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError

_MASK63 = (1 << 63) - 1


def epoch_order(samples: int, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """Returns the order in which an epoch visits ``samples`` samples, shape ``[samples]``, int64."""
    if not shuffle:
        return torch.arange(samples)
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return torch.randperm(samples, generator=generator)


def count_batches(samples: int, batch_size: int, world_size: int, drop_last: bool) -> int:
    """Returns the number of batches that every process sees in an epoch.

    Raises:
        LossplugError: ``drop_last`` would leave no batch at all.
    """
    step = batch_size * world_size
    if not drop_last:
        return -(-samples // step)
    if samples < step:
        across = f" on {world_size} processes" if world_size > 1 else ""
        raise LossplugError(
            f"{samples} samples do not fill one batch of {batch_size}{across}",
            where="batch_size",
            remedy="Take a smaller batch_size or more data",
        )
    return samples // step


def rank_batches(order: Tensor, batch_size: int, rank: int, world_size: int, drop_last: bool) -> list[Tensor]:
    """Cuts an epoch's order into the batches of one process.

    Batch ``k`` of all processes together is the slice ``order[k * W * B : (k + 1) * W * B]``; process ``r`` has its
    ``r``-th part. So the samples behind an optimizer step depend on ``W * B`` alone, not on how they are spread, and
    every process has the same number of batches. Without ``drop_last`` the last slice is shorter; it is filled up with
    the first samples of the order until it divides by ``W``.

    Args:
        order: Sample indices, shape ``[samples]``.
        batch_size: ``B``, samples per process and batch.
        rank: ``r``, from 0.
        world_size: ``W``.
        drop_last: Whether the incomplete last slice is left out.

    Returns:
        Index tensors of at most ``batch_size`` samples.
    """
    steps = count_batches(len(order), batch_size, world_size, drop_last)
    step = batch_size * world_size
    if drop_last:
        order = order[: steps * step]
    elif missing := -len(order) % world_size:
        order = torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]])
    batches = []
    for start in range(0, len(order), step):
        together = order[start : start + step]
        share = len(together) // world_size
        batches.append(together[rank * share : (rank + 1) * share])
    return batches


def mix(*values: int) -> int:
    """Mixes integers into one well-spread integer in ``[0, 2**63)``."""
    state = 0
    for value in values:
        state = _splitmix((state ^ (value & ((1 << 64) - 1))) & ((1 << 64) - 1))
    return state & _MASK63


def random_uniform(index: Tensor, *key: int) -> Tensor:
    """Returns one number of ``[0, 1)`` per index, a function of ``(index, key)`` and of nothing else.

    Counter-based: a sample gets the same number whatever batch, worker or process it is drawn in.

    Args:
        index: int64, any shape.
        key: Seed, epoch, stream number …

    Returns:
        float64 of the shape of ``index``.
    """
    # splitmix64 on int64: the products wrap around, `>>` has to be made logical by masking the sign bits away
    state = index.to(torch.int64) * _signed(0x9E3779B97F4A7C15) + _signed(mix(*key))
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).double() * 2.0**-53


def _splitmix(state: int) -> int:
    full = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & full
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & full
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & full
    return state ^ (state >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)
