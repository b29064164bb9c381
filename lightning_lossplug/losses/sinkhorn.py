"""Sinkhorn divergence: debiased entropic optimal transport between weighted point clouds."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.checks import check_choice, check_floating, check_number, reduce_weighted, upcast
from lightning_lossplug.registry import register


def pairwise(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """Returns costs ``|x_i - y_j|^p / p`` [B, N, M] of points [B, N, D] and [B, M, D] (Euclidean distance)."""
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance**p / p


def entropic_ot(
    cost: Tensor, a: Tensor, b: Tensor, ladder: list[float], rho: float | None = None, damping: float = 0.5
) -> Tensor:
    r"""Returns entropic transport values [B] by log-domain Sinkhorn iterations.

    The value is the dual :math:`\langle a, f\rangle + \langle b, g\rangle - \epsilon \sum_{ij} a_i b_j (E_{ij} - 1)`,
    :math:`E_{ij} = e^{(f_i + g_j - C_{ij})/\epsilon}` (with ``rho``: :math:`\rho(1 - e^{-f/\rho})` for f and g) at the
    potentials of the last iteration, held constant: by the envelope theorem its gradient in cost and weights is that of
    the transport value.

    Args:
        cost: [B, N, M].
        a: Weights [B, N] >= 0.
        b: Weights [B, M] >= 0.
        ladder: :math:`\epsilon` of each iteration; the last one is that of the value.
        rho: Strength of the marginal constraints; None: they hold exactly.
        damping: How far each iteration moves, in (0, 1]; half steps on both sides keep x and y exchangeable.
    """
    with torch.no_grad():
        log_a, log_b, held = a.log()[:, :, None], b.log()[:, None, :], cost.detach()
        f, g = torch.zeros_like(a), torch.zeros_like(b)
        for index, eps in enumerate(ladder):
            shrink = 1.0 if rho is None else rho / (rho + eps)
            new_f = -eps * shrink * torch.logsumexp(log_b + (g[:, None, :] - held) / eps, dim=2)
            new_g = -eps * shrink * torch.logsumexp(log_a + (f[:, :, None] - held) / eps, dim=1)
            move = 1.0 if index == 0 else damping
            f, g = f + move * (new_f - f), g + move * (new_g - g)
    eps = ladder[-1]
    # exp(...) <= 1 / (a_i b_j) at the optimum; the clamp only concerns points of weight 0.
    plan = ((f[:, :, None] + g[:, None, :] - cost) / eps).clamp_max(60).exp()
    mass = torch.einsum("bi,bij,bj->b", a, plan, b) - a.sum(1) * b.sum(1)
    if rho is not None:
        f, g = -rho * torch.expm1(-f / rho), -rho * torch.expm1(-g / rho)
    return (a * f).sum(1) + (b * g).sum(1) - eps * mass


@register(
    "loss",
    "sinkhorn",
    family="distribution",
    paper="Interpolating between Optimal Transport and MMD using Sinkhorn Divergences",
    arxiv="1810.08278",
    signature="samples_pair",
)
class Sinkhorn(Loss):
    r"""Sinkhorn divergence of two samples, the debiased entropic optimal transport.

    :math:`S = OT_\epsilon(a,b) - \frac12 OT_\epsilon(a,a) - \frac12 OT_\epsilon(b,b)`. The cost is :math:`|x-y|^p/p`
    and :math:`\epsilon = \mathrm{blur}^p`. It is symmetric, >= 0 and 0 for equal samples; blur -> 0 is optimal
    transport, blur -> infinity half the squared MMD with kernel -cost. Points [N, D] and [M, D], or batches [B, N, D]
    and [B, M, D], with optional weights; without them every point weighs the same. Memory O(NM). Use it to pull one
    distribution of features or outputs onto another whose support may differ (arXiv 1706.00292, 1810.08278).

    Args:
        p: Exponent >= 1 of the cost.
        blur: Blur > 0, in the unit of distances (normalise features first).
        scaling: Ratio in (0, 1) of successive blurs while :math:`\epsilon` falls from the diameter of the data;
            0.9 is slower and nearer to the limit than 0.5.
        debias: False gives :math:`OT_\epsilon(a,b)` alone, which is not 0 for equal samples.
        reach: None: all mass is transported; else > 0, the distance beyond which mass is rather given up.
        iterations: Least number of iterations of the own backend.
        backend: ``torch`` (own log-domain iterations) or ``geomloss`` (its tensorized backend; p of 1 or
            2; it stops where the fall of blurs ends, so it wants a ``scaling`` near 1).
        reduction: Over the batch: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        p: float = 2,
        blur: float = 0.05,
        scaling: float = 0.5,
        debias: bool = True,
        reach: float | None = None,
        iterations: int = 50,
        backend: Literal["torch", "geomloss"] = "torch",
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        self.p = check_number("sinkhorn", "p", p, least=1)
        self.blur = check_number("sinkhorn", "blur", blur, above=0)
        self.scaling = check_number("sinkhorn", "scaling", scaling, above=0, below=1)
        self.reach = None if reach is None else check_number("sinkhorn", "reach", reach, above=0)
        self.iterations = check_number("sinkhorn", "iterations", iterations, least=1)
        check_choice("sinkhorn", "backend", backend, ("torch", "geomloss"))
        if backend == "geomloss":
            require("geomloss", "ot", "sinkhorn with backend='geomloss'")
            if p not in (1, 2):
                raise LossplugError(f"p is {p}, geomloss has 1 and 2", where="sinkhorn", remedy="Set backend='torch'")
        self.debias, self.backend = debias, backend

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the divergence.

        Args:
            x: Points [N, D] or [B, N, D].
            y: Points [M, D] or [B, M, D].
            a: Weights >= 0 of ``x``, [N] or [B, N]; they should sum to 1 unless ``reach`` is set.
            b: Weights of ``y``.
            denominator: What ``mean`` divides by instead of the number of clouds in the batch.
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        check_floating("sinkhorn", x=x, y=y)
        if x.ndim not in (2, 3) or y.ndim != x.ndim or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
            raise LossplugError(
                f"points {tuple(x.shape)} and {tuple(y.shape)}, expected [N, D] and [M, D], or a batch of them",
                where="sinkhorn",
            )
        for name, weight, cloud in (("a", a, x), ("b", b, y)):
            if weight is not None and weight.shape != cloud.shape[:-1]:
                raise LossplugError(f"{name} {tuple(weight.shape)} for points {tuple(cloud.shape)}", where="sinkhorn")
        with torch.autocast(x.device.type, enabled=False):
            x, y = upcast(x), upcast(y).to(upcast(x).dtype)
            single = x.ndim == 2
            points = [t[None] if single else t for t in (x, y)]
            weights = [self._weights(w, t) for w, t in zip((a, b), points, strict=True)]
            if x.numel() == 0 or y.numel() == 0:
                rows = x.new_zeros(points[0].shape[0]) + x.flatten()[:0].sum() + y.flatten()[:0].sum()
            elif self.backend == "geomloss":
                rows = self._geomloss(points, weights)
            else:
                rows = self._torch(points, weights)
            rows = rows[0] if single else rows
            return reduce_weighted(rows, None, reduction or self.reduction, x, denominator)

    @staticmethod
    def _weights(weight: Tensor | None, points: Tensor) -> Tensor:
        if weight is None:
            return points.new_full(points.shape[:2], 1 / max(points.shape[1], 1))
        return weight.to(points).reshape(points.shape[:2])

    def _geomloss(self, points: list[Tensor], weights: list[Tensor]) -> Tensor:
        loss = require("geomloss", "ot", "sinkhorn with backend='geomloss'").SamplesLoss(
            "sinkhorn",
            p=int(self.p),
            blur=self.blur,
            reach=self.reach,
            scaling=self.scaling,
            debias=self.debias,
            backend="tensorized",
        )
        (x, y), (a, b) = points, weights
        return loss(a, x, b, y)

    def _torch(self, points: list[Tensor], weights: list[Tensor]) -> Tensor:
        (x, y), (a, b) = points, weights
        ladder = self.ladder(x, y)
        rho = None if self.reach is None else self.reach**self.p
        value = entropic_ot(pairwise(x, y, self.p), a, b, ladder, rho)
        if not self.debias:
            return value
        value = value - 0.5 * entropic_ot(pairwise(x, x, self.p), a, a, ladder, rho)
        value = value - 0.5 * entropic_ot(pairwise(y, y, self.p), b, b, ladder, rho)
        return value + 0.5 * ladder[-1] * (a.sum(1) - b.sum(1)) ** 2

    def ladder(self, x: Tensor, y: Tensor) -> list[float]:
        """Returns epsilon of every iteration: from the diameter of the data down to ``blur^p``, then constant."""
        both = torch.cat([x.detach().flatten(0, 1), y.detach().flatten(0, 1)])
        diameter = float(torch.linalg.vector_norm(both.amax(0) - both.amin(0)))
        steps = max(0, math.ceil(math.log(max(diameter, self.blur) / self.blur) / -math.log(self.scaling)))
        blurs = [max(diameter, self.blur) * self.scaling**k for k in range(steps)]
        blurs += [self.blur] * max(1, int(self.iterations) - steps)
        return [blur**self.p for blur in blurs]
