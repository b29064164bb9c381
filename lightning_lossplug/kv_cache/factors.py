r"""Low-rank factors of a projection: :math:`X W \approx X A B` with :math:`A [h, r]` and :math:`B [r, c]`.

Row vectors throughout (a ``torch.nn.Linear`` stores the transpose). Whatever the initialisation, the code is a linear
function of the projected vector alone, :math:`X A = (X W) B^+`, so a cache can encode keys and values without their
inputs: :func:`encoder_of` gives :math:`B^+`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number

_FLOOR = 1e-12  # of the largest eigenvalue: directions without variance keep a finite scale


@dataclass(frozen=True)
class Factors:
    r"""A channel-shrunk code: :math:`z = (x - \mu) E`, :math:`\hat x = \mu + z B`.

    Args:
        encode: E, ``[c, r]``.
        decode: B, ``[r, c]``.
        mean: :math:`\mu`, ``[c]``, or None for 0.
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor | None = None

    @property
    def rank(self) -> int:
        """Channels r of a code."""
        return self.encode.shape[1]

    @property
    def width(self) -> int:
        """Channels c of what is coded."""
        return self.encode.shape[0]

    def code(self, x: Tensor) -> Tensor:
        """Returns the codes ``[..., r]`` of vectors ``[..., c]``."""
        return (x if self.mean is None else x - self.mean) @ self.encode

    def rebuild(self, code: Tensor) -> Tensor:
        """Returns the vectors ``[..., c]`` of codes ``[..., r]``."""
        flat = code.reshape(-1, self.rank)
        rebuilt = flat @ self.decode if self.mean is None else torch.addmm(self.mean, flat, self.decode)
        return rebuilt.view(*code.shape[:-1], self.width)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """Returns the factors on a device, in a dtype."""
        mean = None if self.mean is None else self.mean.to(device, dtype)
        return Factors(self.encode.to(device, dtype), self.decode.to(device, dtype), mean)


def check_rank(rank: int, width: int, where: str) -> int:
    """Returns ``rank``, or raises unless it is a whole number in 1 .. ``width``.

    Raises:
        LossplugError: With the rank and the width.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= width:
        what = "rounds to 0" if rank == 0 else f"is {rank}"
        raise LossplugError(
            f"the rank {what}, allowed is 1 to the width of {width} channels",
            where=where,
            remedy="Remove less" if rank == 0 else None,
        )
    return rank


def svd_init(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Truncated SVD of the weight: optimal for white inputs only.

    :math:`W = U S V^\top`, :math:`A = U_r S_r^{1/2}`, :math:`B = S_r^{1/2} V_r^\top`.

    Args:
        weight: W, ``[h, c]``.
        rank: r, in 1 .. c.

    Returns:
        A ``[h, r]`` and B ``[r, c]``, in the dtype of the weight.

    Raises:
        LossplugError: A rank outside 1 .. c.
    """
    check_rank(rank, min(weight.shape), "svd_init")
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(weight.dtype), (root[:, None] * v[:rank]).to(weight.dtype)


def asvd_init(weight: Tensor, scale: Tensor, rank: int, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    r"""Activation-aware SVD: truncated SVD of the weight with scaled input channels.

    :math:`D = \mathrm{diag}(s^\alpha)`, :math:`s_i = \mathrm{mean}_t |X_{ti}| + 10^{-6}`, :math:`D W = U S V^\top`,
    :math:`A = D^{-1} U_r S_r^{1/2}`, :math:`B = S_r^{1/2} V_r^\top`. The product does not change when s is multiplied
    by a number. At 80 % its perplexity can be worse than :func:`svd_init`'s though its error is smaller.
    (ASVD, arXiv 2312.05821; the initialisation of CSKV, arXiv 2409.10593.)

    Args:
        weight: W, ``[h, c]``.
        scale: Mean absolute value of every input channel, ``[h]``.
        rank: r, in 1 .. c.
        alpha: Exponent of the scale, >= 0; 0 is :func:`svd_init`.

    Returns:
        A ``[h, r]`` and B ``[r, c]``.

    Raises:
        LossplugError: A rank outside 1 .. c, a negative alpha, or a scale of another width.
    """
    check_rank(rank, min(weight.shape), "asvd_init")
    check_number("asvd_init", "alpha", alpha, least=0)
    if scale.shape != weight.shape[:1]:
        raise LossplugError(f"the scale has shape {list(scale.shape)}, the weight {list(weight.shape)}")
    d = (scale.double() + 1e-6) ** alpha
    u, s, v = torch.linalg.svd(d[:, None] * weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root / d[:, None]).to(weight.dtype), (root[:, None] * v[:rank]).to(weight.dtype)


def whitened_init(
    gram: Tensor, weight: Tensor | None, rank: int, metric: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""The closed-form optimum of :math:`\|X W - X A B\|_F^2` over rank r.

    :math:`A = W V_r`, :math:`B = V_r^\top`, where :math:`V_r` are the leading eigenvectors of
    :math:`W^\top (X^\top X) W` (Eckart-Young); the same product as the SVD of the Cholesky-whitened weight (SVD-LLM,
    arXiv 2403.07378; Palu, arXiv 2407.21118). No other factors, trained ones included, have a smaller error on the
    calibration inputs. With a metric :math:`M = R^2` the error is that of :math:`(X W - X A B) R`, and
    :math:`A = W R V_r`, :math:`B = V_r^\top R^{-1}` with the eigenvectors of :math:`R W^\top (X^\top X) W R`.

    Args:
        gram: :math:`X^\top X` up to a factor, ``[h, h]``.
        weight: W, ``[h, c]``; None for the identity, when ``gram`` is that of the projected vectors.
        rank: r, in 1 .. c.
        metric: M, symmetric ``[c, c]``, what an error costs further on, up to a factor (eigenvalues below 1e-4 of the
            largest are raised to that); None for the identity.

    Returns:
        A ``[h, r]`` and B ``[r, c]``, columns of A in order of falling energy.

    Raises:
        LossplugError: A rank outside 1 .. c.
    """
    projected = gram.double() if weight is None else weight.double().T @ gram.double() @ weight.double()
    check_rank(rank, len(projected), "whitened_init")
    root, inverse = metric_root(metric, projected)
    leading = torch.linalg.eigh(root @ projected @ root)[1][:, -rank:].flip(-1)
    a = root @ leading if weight is None else weight.double() @ root @ leading
    dtype = gram.dtype if weight is None else weight.dtype
    return a.to(dtype), (leading.T @ inverse).to(dtype)


def metric_root(metric: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the symmetric root of a metric and its inverse, float64; the identity for None, as large as ``like``."""
    if metric is None:
        one = torch.eye(len(like), dtype=torch.float64, device=like.device)
        return one, one
    values, vectors = torch.linalg.eigh(metric.double().to(like.device))
    values = values.clamp_min(1e-4 * float(values.amax()))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def encoder_of(decode: Tensor) -> Tensor:
    """Returns ``E = B^+ [c, r]``, with which ``X A = (X W) E`` for all three initialisations."""
    return torch.linalg.pinv(decode.double()).to(decode.dtype)


def balanced(factors: Factors, second: Tensor) -> Factors:
    r"""Scales code channels to unit variance; the product :math:`E B` stays what it is.

    Codes of equal size suit few bits with one range per token, and half precision.

    Args:
        factors: Factors.
        second: ``E[x x^T]`` of what is coded (centred if the factors have a mean), ``[c, c]``.
    """
    encode, decode = factors.encode.double(), factors.decode.double()
    variance = torch.einsum("cr,cd,dr->r", encode, second.double(), encode)
    scale = variance.clamp_min(_FLOOR * float(variance.max().clamp_min(_FLOOR))).sqrt()
    return Factors(
        (encode / scale).to(factors.encode.dtype), (scale[:, None] * decode).to(factors.decode.dtype), factors.mean
    )
