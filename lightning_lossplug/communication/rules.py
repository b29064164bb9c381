r"""Rules of error feedback: what a rank compresses, what it remembers of what was dropped, what the optimizer gets.

Each rule works on one tensor at a time and keeps a dict of tensors per rank. With D_i the compressed message of rank i,
w_i = 1/n unless said otherwise and g_i its gradient, every step is: ``target`` -> compress -> exchange -> ``apply``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_lossplug.communication.base import Compressor, Draw
from lightning_lossplug.communication.sparse import Identity
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.registry import register

State = dict[str, Tensor]
Init = Literal["zero", "dense"]


class ErrorFeedback(ABC):
    """A rule for one tensor.

    ``local`` names the tensors that differ between ranks, ``shared`` those that are equal on all of them.
    """

    name: ClassVar[str]
    local: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    everywhere: ClassVar[bool] = False  # uncompressed tensors have a state too
    init: Init = "zero"

    def start(self, gradient: Tensor) -> State:
        """Returns the state before the first step: zeros."""
        return {name: torch.zeros_like(gradient) for name in (*self.local, *self.shared)}

    def restart(self, state: State) -> State:
        """Returns the state of a rank when the number of ranks changed, from the tensors that all ranks share."""
        return dict(state)

    def notes(self, compressor: Compressor, numel: int) -> list[str]:
        """Returns warnings about a pair of rule and compressor, for a tensor of ``numel`` elements."""
        return []

    def weights(self, ranks: int, step: int) -> list[float]:
        """Returns w_i of every rank, in this step."""
        return [1 / ranks] * ranks

    @abstractmethod
    def target(self, state: State, gradient: Tensor, compressor: Compressor, weight: float, ranks: int) -> Tensor:
        """Returns what a rank compresses; changes nothing."""

    @abstractmethod
    def apply(
        self, state: State, gradient: Tensor, target: Tensor, own: Tensor, mean: Tensor, weight: float, ranks: int
    ) -> tuple[Tensor, State]:
        """Returns what the optimizer gets and the new state; changes nothing.

        Args:
            state: Of this rank.
            gradient: Of this rank.
            target: What this rank compressed.
            own: What its message says.
            mean: The sum over ranks of w_i times what their messages say.
            weight: w_i of this rank.
            ranks: How many there are.
        """

    def first(self, state: State, gradient: Tensor) -> State:
        """Returns the state with which a ``dense`` first step starts."""
        return state

    def check(self, compressor: Compressor) -> None:
        """Raises unless the compressor suits the rule.

        Raises:
            LossplugError: It is unbiased and not contractive.
        """
        if compressor.unbiased:
            raise LossplugError(
                f"the compressor {compressor.name!r} is in its unbiased form, which adds noise that error feedback "
                "would amplify",
                where=self.name,
                remedy="Take it with unbiased=False, which divides it by 1 + omega",
            )

    def step(
        self,
        states: Sequence[State | None],
        gradients: Sequence[Tensor],
        compressor: Compressor,
        draw: Draw | None = None,
    ) -> tuple[Tensor, list[State]]:
        """Does one step for all ranks in one process, as :class:`GradientExchange` does it between processes.

        Args:
            states: Of every rank; None before the first step.
            gradients: Of every rank, one shape.
            compressor: The compressor.
            draw: Seed, step and name; the rank is filled in.

        Returns:
            What the optimizer gets, and the new states.
        """
        ranks, draw = len(gradients), draw or Draw()
        weights, begun, messages = self.weights(ranks, draw.step), [], []
        for rank, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
            used, state = self.begin(state, gradient, compressor)
            target = self.target(state, gradient, used, weights[rank], ranks)
            begun.append((state, target))
            messages.append(used(target, replace(draw, rank=rank)))
        mean = torch.stack([w * m for w, m in zip(weights, messages, strict=True)]).sum(0)
        done = [
            self.apply(state, gradients[rank], target, messages[rank], mean, weights[rank], ranks)
            for rank, (state, target) in enumerate(begun)
        ]
        return done[0][0], [state for _, state in done]

    def begin(self, state: State | None, gradient: Tensor, compressor: Compressor) -> tuple[Compressor, State]:
        """Returns the compressor and the state of this step; a first step may be dense."""
        if state is not None:
            return compressor, state
        state = self.start(gradient)
        return (Identity(), self.first(state, gradient)) if self.init == "dense" else (compressor, state)


@register("error_feedback", "none", family="baseline")
class NoFeedback(ErrorFeedback):
    """Forgets what the compressor dropped: p_i = g_i, the optimizer gets mean D_i. What the others are compared to."""

    name: ClassVar[str] = "none"

    def target(self, state: State, gradient: Tensor, compressor: Compressor, weight: float, ranks: int) -> Tensor:
        """The gradient."""
        return gradient

    def apply(
        self, state: State, gradient: Tensor, target: Tensor, own: Tensor, mean: Tensor, weight: float, ranks: int
    ) -> tuple[Tensor, State]:
        """The mean of the messages."""
        return mean, state

    def check(self, compressor: Compressor) -> None:
        """Any compressor."""


@register(
    "error_feedback",
    "ef14",
    family="error",
    paper="Error Feedback Fixes SignSGD and other Gradient Compression Schemes",
    arxiv="1901.09847",
)
class EF14(ErrorFeedback):
    r"""Adds what was dropped to the next gradient: :math:`p_i = e_i + g_i`, :math:`e_i \leftarrow p_i - D_i`.

    The optimizer gets mean D_i. The error is in units of gradients, so a learning-rate schedule weighs old errors by
    the current rate. With ranks that see different data and a harsh compressor it stalls at a distance.
    """

    name: ClassVar[str] = "ef14"
    local: ClassVar[tuple[str, ...]] = ("error",)

    def target(self, state: State, gradient: Tensor, compressor: Compressor, weight: float, ranks: int) -> Tensor:
        """The error plus the gradient."""
        return state["error"] + gradient

    def apply(
        self, state: State, gradient: Tensor, target: Tensor, own: Tensor, mean: Tensor, weight: float, ranks: int
    ) -> tuple[Tensor, State]:
        """The mean of the messages; e = p - D."""
        return mean, {"error": target - own}


@register(
    "error_feedback",
    "econtrol",
    family="control",
    paper="EControl: Fast Distributed Optimization with Compression and Error Control",
    arxiv="2311.05645",
)
class EControl(ErrorFeedback):
    r"""Compresses the change of the gradient plus a damped share of the error.

    :math:`\delta_i = \eta e_i + g_i - h_i`; :math:`e_i \leftarrow e_i + g_i - h_i - D_i`;
    :math:`h_i \leftarrow h_i + D_i`; :math:`h \leftarrow h + \mathrm{mean} D_i`, which the optimizer gets.

    Args:
        eta: Share of the error, in [0, 1); 0 is EF21. None takes min(0.1, a), a the contraction of the compressor, and
            0.1 where that depends on the data. Much above a the error feeds itself.
        init: ``zero``, or ``dense``: the first gradient travels uncompressed.

    Raises:
        LossplugError: ``eta`` out of range or unknown ``init``.
    """

    name: ClassVar[str] = "econtrol"
    local: ClassVar[tuple[str, ...]] = ("error", "estimate")
    shared: ClassVar[tuple[str, ...]] = ("average",)

    def __init__(self, eta: float | None = None, init: Init = "zero") -> None:
        if eta is not None:
            check_number(self.name, "eta", eta, least=0, below=1)
        check_choice(self.name, "init", init, ("zero", "dense"))
        self.eta, self.init = eta, init

    def share(self, compressor: Compressor, numel: int) -> float:
        """Returns eta for a tensor."""
        if self.eta is not None:
            return self.eta
        contraction = compressor.contraction(numel)
        return 0.1 if contraction is None else min(0.1, contraction)

    def notes(self, compressor: Compressor, numel: int) -> list[str]:
        """An eta above the contraction."""
        contraction = compressor.contraction(numel)
        if self.eta is None or contraction is None or self.eta <= contraction:
            return []
        return [f"eta is {self.eta:g}, above the compressor's contraction {contraction:.2g}: the error may feed itself"]

    def restart(self, state: State) -> State:
        """No error; every estimate is the average."""
        return {**state, "error": torch.zeros_like(state["average"]), "estimate": state["average"].clone()}

    def target(self, state: State, gradient: Tensor, compressor: Compressor, weight: float, ranks: int) -> Tensor:
        """The damped error plus the change of the gradient."""
        share = self.share(compressor, gradient.numel())
        return share * state["error"] + gradient - state["estimate"]

    def apply(
        self, state: State, gradient: Tensor, target: Tensor, own: Tensor, mean: Tensor, weight: float, ranks: int
    ) -> tuple[Tensor, State]:
        """The new average."""
        average = state["average"] + mean
        error = state["error"] + gradient - state["estimate"] - own
        return average, {"error": error, "estimate": state["estimate"] + own, "average": average}


@register(
    "error_feedback",
    "ef21",
    family="difference",
    paper="EF21: A New, Simpler, Theoretically Better, and Practically Faster Error Feedback",
    arxiv="2106.05203",
)
class EF21(ErrorFeedback):
    r"""Compresses the change of the gradient: :math:`G_i \leftarrow G_i + C(g_i - G_i)`; the optimizer gets mean G_i.

    For exact gradients; with small batches take ``ef21_sgdm``, since this one does not average noise out.

    Args:
        init: ``zero``, or ``dense``: the first gradient travels uncompressed.

    Raises:
        LossplugError: Unknown ``init``.
    """

    name: ClassVar[str] = "ef21"
    local: ClassVar[tuple[str, ...]] = ("estimate",)
    shared: ClassVar[tuple[str, ...]] = ("average",)

    def __init__(self, init: Init = "zero") -> None:
        check_choice(self.name, "init", init, ("zero", "dense"))
        self.init = init

    def restart(self, state: State) -> State:
        """Every estimate is the average."""
        return {**state, "estimate": state["average"].clone()}

    def target(self, state: State, gradient: Tensor, compressor: Compressor, weight: float, ranks: int) -> Tensor:
        """The change of the weighted gradient g / (n w)."""
        return gradient / (ranks * weight) - state["estimate"]

    def apply(
        self, state: State, gradient: Tensor, target: Tensor, own: Tensor, mean: Tensor, weight: float, ranks: int
    ) -> tuple[Tensor, State]:
        """The new average."""
        average = state["average"] + mean
        return average, {"estimate": state["estimate"] + own, "average": average}


@register(
    "error_feedback",
    "ef21_w",
    family="difference",
    paper="Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants",
    arxiv="2402.10774",
)
class EF21W(EF21):
    r"""EF21 with a weight per rank: :math:`u_i = g_i/(n w_i)`, :math:`G_i \leftarrow G_i + C(u_i - G_i)`.

    The optimizer gets :math:`\sum_i w_i G_i`. With a positively homogeneous compressor (all of ours but ``natural``)
    any weights give the same steps as EF21; what the analysis brings then is a larger step size, see
    :func:`ef21_step_size`. The smoothness constants aren't estimated here.

    Args:
        weights: One per rank, positive, summing to 1; the method's are L_i / sum L_j. None: equal.
        init: ``zero``, or ``dense``: the first gradient travels uncompressed.

    Raises:
        LossplugError: Weights that are not positive or don't sum to 1; later, another number of ranks.
    """

    name: ClassVar[str] = "ef21_w"

    def __init__(self, weights: list[float] | None = None, init: Init = "zero") -> None:
        super().__init__(init)
        if weights is not None and not (all(w > 0 for w in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)):
            raise LossplugError(f"weights are {weights}, allowed are positive numbers with the sum 1", where=self.name)
        self.given = weights

    def weights(self, ranks: int, step: int) -> list[float]:
        """The given ones."""
        if self.given is None:
            return super().weights(ranks, step)
        if len(self.given) != ranks:
            raise LossplugError(
                f"{len(self.given)} weights for {ranks} ranks", where=self.name, remedy="Give one weight per rank"
            )
        return self.given


@register(
    "error_feedback",
    "ef21_sgdm",
    family="difference",
    paper="Momentum Provably Improves Error Feedback!",
    arxiv="2305.15155",
)
class EF21SGDM(ErrorFeedback):
    r"""EF21 on a running mean of the gradient, which small batches need.

    :math:`v_i \leftarrow (1-\beta)v_i + \beta g_i`; :math:`c_i \leftarrow c_i + C(v_i - c_i)`; the optimizer gets
    mean c_i, which already has momentum: leave the optimizer's own at 0, or accept both.

    Args:
        beta: Share of the new gradient, in (0, 1]; 1 is EF21.
        init: ``zero``, or ``dense``: v starts as the first gradient, which travels uncompressed.

    Raises:
        LossplugError: ``beta`` out of range or unknown ``init``.
    """

    name: ClassVar[str] = "ef21_sgdm"
    local: ClassVar[tuple[str, ...]] = ("momentum", "estimate")
    shared: ClassVar[tuple[str, ...]] = ("average",)

    def __init__(self, beta: float = 0.1, init: Init = "zero") -> None:
        self.beta = check_number(self.name, "beta", beta, above=0, most=1)
        check_choice(self.name, "init", init, ("zero", "dense"))
        self.init = init

    def first(self, state: State, gradient: Tensor) -> State:
        """The running mean starts as the gradient."""
        return {**state, "momentum": gradient.clone()}

    def restart(self, state: State) -> State:
        """Every estimate and every running mean is the average."""
        return {**state, "momentum": state["average"].clone(), "estimate": state["average"].clone()}

    def target(self, state: State, gradient: Tensor, compressor: Compressor, weight: float, ranks: int) -> Tensor:
        """The new v minus c."""
        return self._momentum(state, gradient) - state["estimate"]

    def apply(
        self, state: State, gradient: Tensor, target: Tensor, own: Tensor, mean: Tensor, weight: float, ranks: int
    ) -> tuple[Tensor, State]:
        """The new average."""
        average = state["average"] + mean
        momentum = self._momentum(state, gradient)
        return average, {"momentum": momentum, "estimate": state["estimate"] + own, "average": average}

    def _momentum(self, state: State, gradient: Tensor) -> Tensor:
        return (1 - self.beta) * state["momentum"] + self.beta * gradient


def ef21_step_size(smoothness: Sequence[float], mean_smoothness: float, contraction: float) -> tuple[float, float]:
    r"""Returns the largest steps that theory allows EF21, by the first analysis and by the later, larger one.

    :math:`1/(L + L_{QM}\xi)` and :math:`1/(L + L_{AM}\xi)` with the quadratic and the arithmetic mean of the constants
    of the ranks, :math:`\xi = \sqrt{\beta/\theta}`, :math:`\theta = 1-\sqrt{1-a}`, :math:`\beta = (1-a)/\theta`.

    Args:
        smoothness: L_i of every rank.
        mean_smoothness: L of the mean loss.
        contraction: a of the compressor, in (0, 1].

    Source: Error Feedback Reloaded, arXiv 2402.10774.
    """
    check_number("ef21_step_size", "contraction", contraction, above=0, most=1)
    theta = 1 - math.sqrt(1 - contraction)
    xi = math.sqrt((1 - contraction) / theta / theta)
    quadratic = math.sqrt(sum(value**2 for value in smoothness) / len(smoothness))
    arithmetic = sum(smoothness) / len(smoothness)
    return 1 / (mean_smoothness + quadratic * xi), 1 / (mean_smoothness + arithmetic * xi)
