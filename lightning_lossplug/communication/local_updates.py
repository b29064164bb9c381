r"""Rules for clients that take several steps of their own between two messages, and of whom only some report.

With c_i the control of client i, c the average, x the common weights at the start of a round and y_i the client's own:

* every local step uses :math:`g_i(y_i) - c_i + c` in place of the gradient (:meth:`LocalUpdate.correction`);
* after K steps of size lr the mean gradient of the client is :math:`\bar g_i = (x - y_i)/(lr\,K) + c_i - c`;
* the rule compresses a difference to it, and :math:`x \leftarrow x - lr_g\,lr\,K\,(c + \mathrm{mean}_S q_i)`,
  :math:`c \leftarrow c + (S/N)\,\mathrm{mean}_S q_i`, S of N clients reporting.

They are rules of error feedback on :math:`\bar g_i`, so that :class:`GradientExchange` carries them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.communication.base import Compressor, Draw
from lightning_lossplug.communication.rules import ErrorFeedback, State
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


class LocalUpdate(ErrorFeedback):
    """What SCALLION and SCAFCOM share.

    Args:
        participation: Share of the clients that report in a round, in (0, 1]; at least one, drawn anew every round.
        seed: Of the draw, equal on all ranks.

    Raises:
        LossplugError: ``participation`` out of range.
    """

    everywhere: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ("average",)

    def __init__(self, participation: float = 1.0, seed: int = 0) -> None:
        self.participation = check_number(self.name, "participation", participation, above=0, most=1)
        self.seed = seed

    def count(self, ranks: int) -> int:
        """Returns S, how many report."""
        return max(1, round(self.participation * ranks))

    def weights(self, ranks: int, step: int) -> list[float]:
        """1/S for those who report in this round, 0 for the others."""
        generator = Draw(self.seed, step, "clients").shared(torch.device("cpu"))
        sampled = torch.randperm(ranks, generator=generator)[: self.count(ranks)].tolist()
        return [1 / len(sampled) if rank in sampled else 0.0 for rank in range(ranks)]

    def correction(self, state: State | None) -> Tensor | float:
        """Returns c - c_i, added to every local gradient."""
        return 0.0 if state is None else state["average"] - state["control"]

    def restart(self, state: State) -> State:
        """Every client starts from the average."""
        return {**{name: state["average"].clone() for name in self.local}, **state}

    def apply(
        self, state: State, gradient: Tensor, target: Tensor, own: Tensor, mean: Tensor, weight: float, ranks: int
    ) -> tuple[Tensor, State]:
        """The direction c + mean q of the server; who doesn't report keeps its own state."""
        direction = state["average"] + mean
        average = state["average"] + self.count(ranks) / ranks * mean
        if weight == 0:
            return direction, {**state, "average": average}
        return direction, {**self.remember(state, gradient), "control": state["control"] + own, "average": average}

    def remember(self, state: State, gradient: Tensor) -> State:
        """Returns the rest of the state of a client that reports."""
        return state


@register(
    "local_update",
    "scallion",
    family="controlled averaging",
    paper="Stochastic Controlled Averaging for Federated Learning with Communication Compression",
    arxiv="2308.08165",
)
class Scallion(LocalUpdate):
    r"""SCAFFOLD with one compressed message per client and round: :math:`q_i = C(\alpha(\bar g_i - c_i))`.

    With alpha = 1, no compression and all clients it is SCAFFOLD.

    Args:
        alpha: Damping, in (0, 1]; about 1/(1 + omega) of the compressor, 0.1 for strong ones.
        participation: Share of the clients that report in a round, in (0, 1].
        seed: Of the draw.

    Raises:
        LossplugError: A value out of range; later, a compressor that is not unbiased.
    """

    name: ClassVar[str] = "scallion"
    local: ClassVar[tuple[str, ...]] = ("control",)

    def __init__(self, alpha: float = 0.1, participation: float = 1.0, seed: int = 0) -> None:
        super().__init__(participation, seed)
        self.alpha = check_number(self.name, "alpha", alpha, above=0, most=1)

    def check(self, compressor: Compressor) -> None:
        """Unbiased ones only.

        Raises:
            LossplugError: Another.
        """
        if not compressor.unbiased and compressor.name != "identity":
            raise LossplugError(
                f"the compressor {compressor.name!r} is biased",
                where=self.name,
                remedy="Take randk, natural or qsgd with unbiased=True, or the method scafcom",
            )

    def target(self, state: State, gradient: Tensor, compressor: Compressor, weight: float, ranks: int) -> Tensor:
        """The damped difference to the control."""
        return self.alpha * (gradient - state["control"])


@register(
    "local_update",
    "scafcom",
    family="controlled averaging",
    paper="Stochastic Controlled Averaging for Federated Learning with Communication Compression",
    arxiv="2308.08165",
)
class Scafcom(LocalUpdate):
    r"""SCALLION with momentum, for contractive compressors such as Top-k.

    :math:`v_i \leftarrow (1-\beta)v_i + \beta\bar g_i`, :math:`q_i = C(v_i - c_i)`,
    :math:`c_i \leftarrow c_i + q_i`. With one local step and all clients it is ``ef21_sgdm``.

    Args:
        beta: Share of the new gradient, in (0, 1].
        participation: Share of the clients that report in a round, in (0, 1].
        seed: Of the draw.

    Raises:
        LossplugError: A value out of range; later, a compressor in its unbiased form.
    """

    name: ClassVar[str] = "scafcom"
    local: ClassVar[tuple[str, ...]] = ("control", "momentum")

    def __init__(self, beta: float = 0.2, participation: float = 1.0, seed: int = 0) -> None:
        super().__init__(participation, seed)
        self.beta = check_number(self.name, "beta", beta, above=0, most=1)

    def target(self, state: State, gradient: Tensor, compressor: Compressor, weight: float, ranks: int) -> Tensor:
        """The new running mean minus the control."""
        return self.remember(state, gradient)["momentum"] - state["control"]

    def remember(self, state: State, gradient: Tensor) -> State:
        """The new running mean."""
        return {**state, "momentum": (1 - self.beta) * state["momentum"] + self.beta * gradient}
