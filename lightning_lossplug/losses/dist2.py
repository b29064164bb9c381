"""DIST2Loss: targets that spread over tokens by their distance from the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.losses.token_values import TokenValueLoss
from lightning_lossplug.registry import register

Distance = Literal["sq", "abs", "mse", "cosine"]


def distances(values: Tensor, truth: Tensor, kind: Distance) -> Tensor:
    """Returns distances [R, S] of true values ([R] or [R, D]) from S values ([S] or [S, D])."""
    if kind == "sq":
        return (values - truth[:, None]) ** 2
    if kind == "abs":
        return (values - truth[:, None]).abs()
    if kind == "mse":
        return torch.cdist(truth, values, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / values.shape[1]
    return 1 - F.normalize(truth, dim=1) @ F.normalize(values, dim=1).T


def tau_for_entropy(distance: Tensor, entropy: float) -> float:
    """Returns the temperature at which targets ``softmax(-distance / tau)`` have a mean entropy, by bisection.

    Args:
        distance: Distances [R, S] of some labels from all S value tokens.
        entropy: Entropy in nats, in (0, log S).

    Raises:
        LossplugError: The entropy is out of reach.
    """
    check_number(
        "tau_for_entropy", "entropy", entropy, above=0, below=torch.tensor(float(distance.shape[1])).log().item()
    )
    low, high = 1e-8, 1e8
    for _ in range(80):
        tau = (low * high) ** 0.5
        logs = (-distance.double() / tau).log_softmax(dim=1)
        low, high = (low, tau) if -(logs.exp() * logs).sum(1).mean() > entropy else (tau, high)
    return (low * high) ** 0.5


@register(
    "loss",
    "dist2",
    family="language",
    paper="Teaching Metric Distance to Discrete Autoregressive Language Models",
    arxiv="2503.02379",
    signature="token_logits_values",
    needs=("tokenizer_values",),
    additive=True,
)
class Dist2(TokenValueLoss):
    r"""Metric-distance targets, a term to add to cross-entropy: :math:`\alpha\,\mathrm{KL}(p_d \,\|\, p_\theta)`.

    At positions whose label y has a value, :math:`p_d(v) = \mathrm{softmax}_v(-d(v, y)/\tau)` over the tokens with a
    value. Logits [B, T, V], labels [B, T], table [V] (``sq``, ``abs``) or [V, D] of embeddings (``mse``, ``cosine``),
    NaN elsewhere. Use it where tokens have a geometry: digits, coordinates, codebooks of image or audio tokenizers
    (choose tau there by :func:`tau_for_entropy`); arXiv 2503.02379.

    Args:
        alpha: Weight >= 0.
        tau: Temperature > 0; the smaller, the closer to one-hot targets.
        distance: ``sq`` and ``abs`` difference of values, ``mse`` or ``cosine`` distance of embeddings.
        restrict: Compare with the softmax over the value tokens (the authors' code); False: over the whole vocabulary
            (the paper).
        values: Value table, see :meth:`set_values`.
        ignore_index: Label of positions that are left out.
        reduction: ``none``, ``mean`` (over positions with a value) or ``sum``.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        tau: float = 1.0,
        distance: Distance = "sq",
        restrict: bool = True,
        values: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(None, ignore_index, reduction)
        check_choice("dist2", "distance", distance, ("sq", "abs", "mse", "cosine"))
        self.alpha = check_number("dist2", "alpha", alpha, least=0)
        self.tau = check_number("dist2", "tau", tau, above=0)
        self.distance, self.restrict = distance, restrict
        if values is not None:
            self.set_values(values)

    def check_values(self, values: Tensor) -> Tensor:
        """Wants [V, D] for distances of embeddings, [V] otherwise."""
        if self.distance in ("sq", "abs"):
            return super().check_values(values)
        if values.ndim != 2:
            raise LossplugError(
                f"the value table has shape {tuple(values.shape)}, this distance needs embeddings [V, D]", where="Dist2"
            )
        super().check_values(values.sum(dim=1))
        return values

    def wants_mass(self) -> bool:
        """For the softmax over the whole vocabulary."""
        return not self.restrict

    def rows(self, z: Tensor, outside: Tensor | None, values: Tensor, slot: Tensor) -> Tensor:
        """The weighted divergence of every row."""
        log_target = (-distances(values, values[slot], self.distance) / self.tau).log_softmax(dim=1)
        log_target = log_target.clamp_min(torch.finfo(z.dtype).min)  # 0 * -inf for a tau near 0
        log_model = z.log_softmax(dim=1) if outside is None else z - outside[:, None]
        return self.alpha * torch.linalg.vecdot(log_target.exp(), log_target - log_model)
