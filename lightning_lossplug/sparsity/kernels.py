"""Triton kernel of the N:M mask and, in the same pass, of the masked weight and SR-STE's pull; for GPUs.

Imported only where Triton is installed and the weight lies on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COMPARISONS = 8192  # per program
_INTEGERS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _nm(  # type: ignore[no-untyped-def] # noqa: ANN202
    source,  # noqa: ANN001
    weight,  # noqa: ANN001
    mask,  # noqa: ANN001
    used,  # noqa: ANN001
    grad,  # noqa: ANN001
    groups,  # noqa: ANN001
    inner,  # noqa: ANN001
    decay,  # noqa: ANN001
    pull,  # noqa: ANN001
    N: tl.constexpr,
    M: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    INTEGER: tl.constexpr,
    COMPUTE: tl.constexpr,
    USED: tl.constexpr,
    PULL: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, M)
    at = ((group // inner) * M * inner + group % inner)[:, None] + place[None, :] * inner
    inside = (group < groups)[:, None] & (place[None, :] >= 0)
    # Without the sign bit, numbers of one width have the order of their bits, and -0.0 equals 0.0.
    keys = tl.load(source + at, mask=inside, other=0.0).to(INTEGER, bitcast=True) & MAGNITUDE
    own, other = keys[:, :, None], keys[:, None, :]
    before = (other > own) | ((other == own) & (place[None, None, :] < place[None, :, None]))
    keep = tl.sum(before.to(tl.int32), 2) < N
    if BITS:  # the entries of a program lie one behind the other
        each: tl.constexpr = BLOCK * M // 8
        eight = tl.reshape(keep.to(tl.int32), (each, 8)) << tl.arange(0, 8)[None, :]
        byte = tl.program_id(0).to(tl.int64) * each + tl.arange(0, each)
        tl.store(mask + byte, tl.sum(eight, 1).to(tl.uint8), mask=byte < groups * M // 8)
    else:
        tl.store(mask + at, keep.to(tl.int8), mask=inside)
    if USED or PULL:
        raw = tl.load(weight + at, mask=inside, other=0.0)
        w = raw.to(COMPUTE)
        if USED:
            # A product with a factor of 0 could be -0.0.
            low = tl.where(decay == 0.0, 0.0, w * decay)
            tl.store(used + at, tl.where(keep, w, low).to(raw.dtype), mask=inside)
        if PULL:
            g = tl.load(grad + at, mask=inside, other=0.0)
            pulled = g.to(COMPUTE) + pull * w
            tl.store(grad + at, tl.where(keep, g.to(COMPUTE), pulled).to(g.dtype), mask=inside)


def fill(
    source: Tensor,
    n: int,
    mask: Tensor,
    *,
    weight: Tensor | None = None,
    used: Tensor | None = None,
    decay: float = 0.0,
    grad: Tensor | None = None,
    pull: float = 0.0,
) -> None:
    """Writes the N:M mask of ``source`` and, if asked, what follows from it, in one pass.

    Args:
        source: Contiguous ``[G, m, I]``: what orders the entries of a group, by magnitude.
        n: Entries kept.
        mask: Contiguous bool of the same shape; or, for I = 1 and a multiple of 8 entries, its bits, uint8.
        weight: The weight, where it isn't ``source`` itself.
        used: Receives ``W (mask + decay (1 - mask))``.
        decay: Factor of pruned entries.
        grad: Receives ``+ pull (1 - mask) W``.
        pull: Strength.
    """
    outer, m, inner = source.shape
    weight = source if weight is None else weight
    packed = mask.dtype == torch.uint8
    block = max(8 // m if packed and m < 8 else 1, _COMPARISONS // (m * m))
    size = source.element_size()
    groups = outer * inner
    _nm[(triton.cdiv(groups, block),)](
        source,
        weight,
        mask if packed else mask.view(torch.int8),
        mask if used is None else used,
        mask if grad is None else grad,
        groups,
        inner,
        decay,
        pull,
        N=n,
        M=m,
        MAGNITUDE=(1 << (8 * size - 1)) - 1,
        INTEGER=_INTEGERS[size],
        COMPUTE=tl.float64 if size == 8 else tl.float32,
        USED=used is not None,
        PULL=grad is not None,
        BITS=packed,
        BLOCK=block,
    )
