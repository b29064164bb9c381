"""Number token loss: a numeric error at tokens that are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.losses.token_values import TokenValueLoss
from lightning_lossplug.registry import register


@register(
    "loss",
    "number_token",
    family="language",
    paper="Regress, Don't Guess: A Regression-like Loss on Number Tokens for Language Models",
    arxiv="2411.02083",
    signature="token_logits_values",
    needs=("tokenizer_values",),
    additive=True,
)
class NumberToken(TokenValueLoss):
    r"""Number token loss (NTL), a term to add to cross-entropy: :math:`\lambda\,\mathrm{NTL}`.

    With q the softmax over number tokens only and values v: ``was`` is :math:`\sum_j q_j |v_j - v_y|` (the Wasserstein
    distance to the label), ``mse`` is :math:`(\sum_j q_j v_j - v_y)^2`. Positions whose label is no number don't count.
    Logits [B, T, V], labels [B, T], value table [V] with NaN for other tokens. Digit tokens carry their face value,
    whatever their place in the number. Use it when a language model has to write numbers that are near the truth
    (arXiv 2411.02083).

    Args:
        weight: :math:`\lambda \ge 0`.
        variant: ``was`` or ``mse``.
        digit_level: Which tokens are numbers when a table is built for this loss from a tokenizer: the ten digits, or
            with False every token that reads as a number.
        reweigh: Also move probability from the other tokens to the numbers: with m the probability of all number
            tokens, :math:`\mathrm{NTL}\,m + 1.01\,d_{max}(1-m)`. The published package does so by default, the paper
            doesn't.
        squash: > 1, for ``was`` on large values: distances between different numbers are rescaled linearly to
            [1, squash].
        values: Value table [V], see :meth:`set_values`.
        ignore_index: Label of positions that are left out.
        reduction: ``none``, ``mean`` (over number positions) or ``sum``.
    """

    def __init__(
        self,
        weight: float = 0.3,
        variant: Literal["was", "mse"] = "was",
        digit_level: bool = True,
        reweigh: bool = False,
        squash: float | None = None,
        values: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(values, ignore_index, reduction)
        check_choice("number_token", "variant", variant, ("was", "mse"))
        self.weight = check_number("number_token", "weight", weight, least=0)
        if squash is not None:
            check_number("number_token", "squash", squash, above=1)
            if variant != "was":
                raise LossplugError("squash rescales distances, which variant='mse' has none of", where="number_token")
        self.variant, self.digit_level, self.reweigh, self.squash = variant, digit_level, reweigh, squash

    def wants_mass(self) -> bool:
        """For reweighing only."""
        return self.reweigh

    def rows(self, z: Tensor, outside: Tensor | None, values: Tensor, slot: Tensor) -> Tensor:
        """The weighted term of every row."""
        q = z.softmax(dim=1)
        truth = values[slot]
        spread = values.max() - values.min()
        if self.variant == "mse":
            loss, largest = (q @ values - truth) ** 2, spread**2
        else:
            distance = (values - truth[:, None]).abs()
            largest = spread
            if self.squash is not None:
                steps = values.sort().values.diff()
                nearest = torch.where(steps > 0, steps, torch.inf).amin() if len(values) > 1 else spread
                scale = (self.squash - 1) / torch.where(spread > nearest, spread - nearest, torch.inf)
                distance = torch.where(distance > 0, 1 + (distance - nearest) * scale, 0)
                largest = 1 + (spread - nearest) * scale
            loss = torch.linalg.vecdot(q, distance)
        if outside is not None:
            mass = (z.logsumexp(dim=1) - outside).exp()
            loss = loss * mass + 1.01 * largest * (1 - mass)
        return self.weight * loss
