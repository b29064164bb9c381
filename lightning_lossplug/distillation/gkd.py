"""Divergences for language models: generalised Jensen-Shannon, skew, reverse."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from lightning_lossplug.distillation.base import LogitLoss, check_temperature
from lightning_lossplug.distillation.divergences import jsd, reverse_kl, skew_kl, skew_reverse_kl
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.registry import register

Direction = Literal["forward", "reverse"]


class _TokenLoss(LogitLoss):
    def __init__(self, temperature: float, t2_scale: bool, reduction: str, ignore_index: int) -> None:
        super().__init__(reduction, ignore_index)
        self.temperature = check_temperature(type(self).__name__.lower(), temperature)
        self.t2_scale = t2_scale

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows, times :math:`T^2` where asked."""
        return rows * self.temperature**2 if self.t2_scale else rows


@register(
    "loss",
    "gkd",
    family="distillation",
    paper="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    arxiv="2306.13649",
    aliases=("jsd",),
    signature="logits_teacher",
    divergence="jsd",
)
class GKD(_TokenLoss):
    r"""Generalised Jensen-Shannon divergence, the loss of GKD.

    :math:`\beta KL(p\|m) + (1-\beta) KL(q\|m)` with :math:`m = \beta p + (1-\beta) q` of teacher p and student q. At
    ``beta`` 0 it is KL(p‖q) and at 1 KL(q‖p), the limits over ``beta`` and ``1 - beta``: the scale jumps there.

    Use it for language models, on any text; 0.5 is bounded by log 2.

    Args:
        beta: In [0, 1].
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`; off, as usual for language models.
        reduction: ``tokenmean``, ``batchmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of tokens that are left out.
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        t2_scale: bool = False,
        reduction: str = "tokenmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, t2_scale, reduction, ignore_index)
        self.beta = check_number("gkd", "beta", beta, least=0, most=1)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Divergence of each token."""
        return self.scaled(jsd(z_s, z_t, self.beta, self.temperature))


@register(
    "loss",
    "distillm",
    family="distillation",
    paper="DistiLLM: Towards Streamlined Distillation for Large Language Models",
    arxiv="2402.03898",
    aliases=("skew_kl",),
    signature="logits_teacher",
)
class DistiLLM(_TokenLoss):
    r"""Skew divergences: :math:`KL(p \| a p + (1-a) q)` forward, :math:`KL(q \| (1-a) p + a q)` reverse.

    ``alpha`` 0 is the plain KL, 1 is 0. The reverse form's gradient stays bounded where the teacher's probability
    underflows.

    Use it for language models where the reverse KL is unstable.

    Args:
        alpha: a in [0, 1].
        direction: ``forward`` or ``reverse``.
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`.
        reduction: ``tokenmean``, ``batchmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of tokens that are left out.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        direction: Direction = "forward",
        temperature: float = 1.0,
        t2_scale: bool = False,
        reduction: str = "tokenmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, t2_scale, reduction, ignore_index)
        check_choice("distillm", "direction", direction, get_args(Direction))
        self.alpha, self.direction = check_number("distillm", "alpha", alpha, least=0, most=1), direction

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Divergence of each token."""
        skew = skew_kl if self.direction == "forward" else skew_reverse_kl
        return self.scaled(skew(z_s, z_t, self.alpha, self.temperature))


@register(
    "loss",
    "minillm",
    family="distillation",
    paper="MiniLLM: Knowledge Distillation of Large Language Models",
    arxiv="2306.08543",
    aliases=("reverse_kl",),
    signature="logits_teacher",
    divergence="reverse_kl",
)
class MiniLLM(_TokenLoss):
    r"""The exact one-step part of MiniLLM: the reverse divergence :math:`KL(q \| p)` of each token.

    The policy gradient over generated text is not part of it.

    Use it for a small language model that can't cover all that the teacher says.

    Args:
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`.
        reduction: ``tokenmean``, ``batchmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of tokens that are left out.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        t2_scale: bool = False,
        reduction: str = "tokenmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, t2_scale, reduction, ignore_index)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Divergence of each token."""
        return self.scaled(reverse_kl(z_s, z_t, self.temperature))
