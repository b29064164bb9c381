"""Cauchy-Schwarz divergence between samples, and the information bottleneck for regression built on it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.checks import check_floating, check_number, upcast
from lightning_lossplug.registry import register


def log_gram(a: Tensor, b: Tensor, sigma: float | Tensor) -> Tensor:
    r"""Returns the log Gaussian Gram matrix :math:`-|a_i - b_j|^2 / (2\sigma^2)` of rows [N, D] and [M, D]."""
    return -(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * sigma**2)


def median_distance(a: Tensor) -> Tensor:
    """Returns the median distance of different rows of [N, D] (their mean if it is 0; 1 if all rows are equal)."""
    distance = torch.pdist(a.detach())
    median = distance.median() if distance.numel() else a.new_zeros(())
    median = torch.where(median > 0, median, distance.sum() / max(distance.numel(), 1))
    return torch.where(median > 0, median, 1)


def conditional_cs_divergence(log_kx: Tensor, log_ky: Tensor, log_kyhat: Tensor, log_cross: Tensor) -> Tensor:
    r"""Returns the estimate of the divergence between p(y|x) and p(yhat|x), in bits.

    With K, L, L', X the Gram matrices of x, of y, of yhat and of (yhat, y), and
    :math:`S(G) = \sum_i \frac{\sum_j K_{ij} G_{ij}}{\sum_j K_{ij}^2}`:
    :math:`\log_2 S(L) + \log_2 S(L') - 2 \log_2 S(X)`. It is 0 for yhat = y, but not always >= 0.

    Args:
        log_kx: Logarithm of K, [N, N].
        log_ky: Logarithm of L.
        log_kyhat: Logarithm of L'.
        log_cross: Logarithm of X.
    """
    rows = (2 * log_kx).logsumexp(dim=1)

    def log_s(log_g: Tensor) -> Tensor:
        return ((log_kx + log_g).logsumexp(dim=1) - rows).logsumexp(dim=0)

    return (log_s(log_ky) + log_s(log_kyhat) - 2 * log_s(log_cross)) / math.log(2)


def cs_qmi(log_kx: Tensor, log_kz: Tensor) -> Tensor:
    r"""Returns the Cauchy-Schwarz quadratic mutual information of two variables from log Gram matrices [N, N], in bits.

    :math:`\log_2 \frac{\mathrm{tr}(K_x K_z)}{N^2} + \log_2 \frac{\sum K_x \sum K_z}{N^4}
    - 2 \log_2 \frac{1^T K_x K_z 1}{N^3}`, which is >= 0.
    """
    joint = (log_kx + log_kz).flatten().logsumexp(0)
    margins = log_kx.flatten().logsumexp(0) + log_kz.flatten().logsumexp(0)
    cross = (log_kx.logsumexp(dim=0) + log_kz.logsumexp(dim=0)).logsumexp(0)
    return (joint + margins - 2 * cross) / math.log(2)  # the powers of N cancel


@register(
    "loss",
    "cs_divergence",
    family="distribution",
    paper="Cauchy-Schwarz Divergence Information Bottleneck for Regression",
    arxiv="2404.17951",
    signature="samples_pair",
)
class CSDivergence(Loss):
    r"""Cauchy-Schwarz divergence of two samples by Gaussian kernels.

    :math:`\log \bar K_{xx} + \log \bar K_{yy} - 2 \log \bar K_{xy}`. The bars are means of the Gram matrices of points
    [N, D] and [M, D]. It is symmetric, >= 0 and 0 for equal samples. Use it as a distribution term where a closed form
    without iterations is wanted; ``sinkhorn`` has gradients also where the samples are many bandwidths apart.

    Args:
        sigma: Bandwidth > 0, in the unit of distances.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__("mean")
        self.sigma = check_number("cs_divergence", "sigma", sigma, above=0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the divergence of points [N, D] and [M, D].

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        check_floating("cs_divergence", x=x, y=y)
        if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
            raise LossplugError(
                f"points {tuple(x.shape)} and {tuple(y.shape)}, expected [N, D] and [M, D]", where="cs_divergence"
            )
        with torch.autocast(x.device.type, enabled=False):
            x, y = upcast(x), upcast(y).to(upcast(x).dtype)
            if x.numel() == 0 or y.numel() == 0:
                return x.sum() * 0 + y.sum() * 0

            def log_mean(a: Tensor, b: Tensor) -> Tensor:
                return log_gram(a, b, self.sigma).flatten().logsumexp(0) - math.log(len(a) * len(b))

            return log_mean(x, x) + log_mean(y, y) - 2 * log_mean(x, y)


@register(
    "loss",
    "cauchy_schwarz_ib",
    family="distribution",
    paper="Cauchy-Schwarz Divergence Information Bottleneck for Regression",
    arxiv="2404.17951",
    signature="samples_pair",
    needs=("features",),
)
class CauchySchwarzIB(Loss):
    r"""Information bottleneck for regression: prediction and compression by Cauchy-Schwarz divergences.

    :math:`D_{CS}(p(y|x), p(\hat y|x)) + \beta\,I_{CS}(x, z)/\sqrt{I(x,x) I(z,z)}`. Called as ``loss(x, z, y, yhat)``
    with inputs x, features z, targets y and predictions yhat of N samples, [N, *] each (flattened per sample). Both
    terms are kernel estimates in bits, O(N^2) memory, computed on logarithms, so that predictions many bandwidths off
    still have a gradient. In many input dimensions the Gram matrix of x is close to the identity and the first term
    compares each prediction with its own target only. Use it for small regression problems that want compressed
    features (arXiv 2404.17951).

    Args:
        sigma: Bandwidth > 0 on standardised data, the same for x, z and y; or ``median``: of each variable the median
            distance of its samples (y and yhat: of y). The released code takes the median of *squared* distances, ten
            times, which is not scale free.
        beta: Weight >= 0 of the compression. The default is chosen here; tune it, from 1e-3 to 1.
    """

    def __init__(self, sigma: float | Literal["median"] = 1.0, beta: float = 0.01) -> None:
        super().__init__("mean")
        if sigma != "median":
            check_number("cauchy_schwarz_ib", "sigma", sigma, above=0)
        self.sigma: float | str = sigma
        self.beta = check_number("cauchy_schwarz_ib", "beta", beta, least=0)

    def _bandwidth(self, samples: Tensor) -> float | Tensor:
        return median_distance(samples) if isinstance(self.sigma, str) else self.sigma

    def forward(self, x: Tensor, z: Tensor, y: Tensor, yhat: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            x: Inputs [N, *].
            z: Features [N, *].
            y: Targets [N, *].
            yhat: Predictions, the shape of ``y``.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        where = "cauchy_schwarz_ib"
        check_floating(where, x=x, z=z, y=y, yhat=yhat)
        if y.shape != yhat.shape or y.ndim == 0 or {len(x), len(z)} != {len(y)}:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in (("x", x), ("z", z), ("y", y), ("yhat", yhat)))
            raise LossplugError(f"the shapes don't fit: {shapes}", where=where)
        with torch.autocast(yhat.device.type, enabled=False):
            out = upcast(yhat)
            if out.numel() == 0:
                return out.sum() * 0 + z.sum() * 0
            x, z, y, out = (upcast(t).to(out.dtype).reshape(len(t), -1) for t in (x, z, y, out))
            sigma_x, sigma_z, sigma_y = self._bandwidth(x), self._bandwidth(z), self._bandwidth(y)
            log_kx = log_gram(x, x, sigma_x)
            loss = conditional_cs_divergence(
                log_kx, log_gram(y, y, sigma_y), log_gram(out, out, sigma_y), log_gram(out, y, sigma_y)
            )
            if self.beta == 0:
                return loss + z.sum() * 0
            log_kz = log_gram(z, z, sigma_z)
            scale = cs_qmi(log_kx, log_kx) * cs_qmi(log_kz, log_kz)
            # Constant features carry no information: 0 over 0 is 0 here.
            return loss + self.beta * cs_qmi(log_kx, log_kz) / scale.clamp_min(torch.finfo(out.dtype).eps).sqrt()
