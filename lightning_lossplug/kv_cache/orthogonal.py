"""Orthogonal bases of keys and values: principal axes by head, the Cayley transform, ranks by singular values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.factors import Factors
from lightning_lossplug.losses.checks import check_number


def principal_axes(second: Tensor, heads: int) -> Tensor:
    """Returns an orthogonal basis for every head, columns in order of falling energy, ``[heads, d, d]``.

    Args:
        second: ``E[x x^T]`` of the channels of all heads of a token, ``[heads * d, heads * d]``.
        heads: How many.

    Raises:
        LossplugError: The channels can't be split into so many heads.
    """
    width, left = divmod(len(second), heads)
    if left:
        raise LossplugError(f"{len(second)} channels are no {heads} heads", where="principal_axes")
    blocks = [second[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(heads)]
    return torch.linalg.eigh(torch.stack(blocks))[1].flip(-1)


def cayley(free: Tensor) -> Tensor:
    r"""Returns :math:`(I - S)(I + S)^{-1}` with :math:`S = (A - A^\top)/2`, an orthogonal matrix for every A.

    The identity at A = 0, and differentiable everywhere, so that a basis :math:`U_0\,\mathrm{cayley}(A)` can be trained
    freely and stays orthogonal (MatryoshkaKV, arXiv 2410.14731).

    Args:
        free: A, ``[..., d, d]``.
    """
    skew = (free - free.transpose(-1, -2)) / 2
    one = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    # I - S and (I + S)^-1 commute, so that a solve from the left does
    return torch.linalg.solve(one + skew, one - skew)


def axis_energies(second: Tensor, bases: Tensor) -> Tensor:
    """Returns the energy of every axis, ``E[(u^T x)^2]``, ``[heads, d]``.

    Args:
        second: ``E[x x^T]``, ``[heads * d, heads * d]``.
        bases: ``[heads, d, d]``.
    """
    heads, width, _ = bases.shape
    blocks = second.view(heads, width, heads, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return torch.einsum("hdr,hde,her->hr", bases, blocks, bases)


def ranks_of_threshold(spectra: Sequence[Tensor], threshold: float) -> list[int]:
    """Returns the least rank of every spectrum whose singular values sum to a share of all; 1 keeps everything.

    EigenAttention (arXiv 2408.05646) sums singular values, not their squares, which keeps more of a long tail.

    Args:
        spectra: Eigenvalues of second moments (squared singular values) in falling order.
        threshold: The share, in (0, 1].

    Raises:
        LossplugError: A threshold outside.
    """
    check_number("ranks_of_threshold", "threshold", threshold, above=0, most=1)
    found = []
    for spectrum in spectra:
        sizes = spectrum.double().clamp_min(0).sqrt()
        reached = sizes.cumsum(0) / sizes.sum().clamp_min(1e-300)
        count = 1 + int((reached < threshold * (1 - 1e-12)).sum())
        found.append(len(sizes) if threshold == 1 else min(count, len(sizes)))
    return found


def nested_ranks(energies: Tensor, rank: int) -> list[int]:
    """Splits the rank of a layer over its heads, next axis by next axis, each where it takes most energy.

    Axes of a head are taken in their order, so that what is kept is nested. Every head gets one at least.

    Args:
        energies: Of the axes, ``[heads, d]``.
        rank: Channels of all heads together.

    Raises:
        LossplugError: Fewer channels than heads, or more than there are.
    """
    heads, width = energies.shape
    if not heads <= rank <= heads * width:
        raise LossplugError(f"the rank {rank} is not in {heads} to {heads * width}", where="nested_ranks")
    ranks = [1] * heads
    for _ in range(rank - heads):
        left = [float(energies[h, r]) if r < width else float("-inf") for h, r in enumerate(ranks)]
        ranks[max(range(heads), key=left.__getitem__)] += 1
    return ranks


def basis_factors(bases: Sequence[Tensor]) -> Factors:
    """Returns the factors that project every head on the columns of its basis: :math:`E = U`, :math:`B = U^T`.

    Args:
        bases: By head, ``[d, r_h]`` with orthonormal columns.
    """
    encode = torch.block_diag(*bases)
    return Factors(encode, encode.T.contiguous())
