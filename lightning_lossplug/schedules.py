r"""Values over training progress: constant, linear, cosine, cubic, exponential, step.

A schedule is a function of :class:`Progress` and nothing else, so that a resumed run continues without a jump.
Points in time are given in one ``unit``: ``fraction`` of the run (0 to 1), optimizer ``steps`` or ``epochs``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register

Unit = Literal["fraction", "steps", "epochs"]


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Args:
        step: Optimizer steps taken (skipped steps of a gradient scaler don't count).
        total_steps: Optimizer steps of the whole run; None when it has no known end.
        steps_per_epoch: Optimizer steps of one epoch; None when unknown.
    """

    step: int
    total_steps: int | None = None
    steps_per_epoch: float | None = None

    @property
    def fraction(self) -> float:
        """Progress in [0, 1].

        Raises:
            LossplugError: The length of the run is unknown.
        """
        if self.total_steps is None:
            raise LossplugError(
                "the training length is unknown, so there is no fraction of it",
                remedy="Set max_steps or max_epochs on the Trainer, or give the schedule in steps",
            )
        return min(self.step / max(self.total_steps, 1), 1.0)

    def at(self, unit: Unit) -> float:
        """Returns the progress in a unit.

        Raises:
            LossplugError: The unit can't be told for this run.
        """
        if unit == "steps":
            return float(self.step)
        if unit == "fraction":
            return self.fraction
        if self.steps_per_epoch is None:
            raise LossplugError(
                "the length of an epoch is unknown", remedy="Give the schedule in steps, or a data set with a length"
            )
        return self.step / self.steps_per_epoch


@dataclass(frozen=True)
class Schedule(ABC):
    """A value over progress: ``start`` until ``begin``, ``end`` from ``finish`` on, a curve between.

    Args:
        start: Value before ``begin``.
        end: Value after ``finish``.
        begin: Point in time, in ``unit``.
        finish: Point in time, in ``unit``, after ``begin``.
        unit: ``fraction`` (of the run), ``steps`` (of the optimizer) or ``epochs``.
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0
    unit: Unit = "fraction"

    def __post_init__(self) -> None:
        where = type(self).__name__
        if self.unit not in ("fraction", "steps", "epochs"):
            raise LossplugError(f"unit is {self.unit!r}", where=where, remedy="Use 'fraction', 'steps' or 'epochs'")
        if not 0 <= self.begin < self.finish:
            raise LossplugError(f"begin {self.begin} has to be >= 0 and before finish {self.finish}", where=where)
        if self.unit == "fraction" and self.finish > 1:
            raise LossplugError(
                f"finish is {self.finish}, a fraction ends at 1",
                where=where,
                remedy="Set unit='steps' or unit='epochs'",
            )
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise LossplugError("start and end have to be finite", where=where)

    @abstractmethod
    def curve(self, t: float) -> float:
        """Returns how far the value has moved, 0 at ``t = 0`` and 1 at ``t = 1``."""

    def __call__(self, progress: Progress) -> float:
        """Returns the value at a point of training."""
        t = (progress.at(self.unit) - self.begin) / (self.finish - self.begin)
        if t <= 0:
            return self.start
        if t >= 1:
            return self.end
        moved = self.curve(t)
        return self.start * (1 - moved) + self.end * moved


@register("schedule", "linear", family="schedule")
class Linear(Schedule):
    """A straight line from ``start`` to ``end``."""

    def curve(self, t: float) -> float:
        """``t``."""
        return t


@register(
    "schedule",
    "cosine",
    family="schedule",
    paper="SGDR: Stochastic Gradient Descent with Warm Restarts",
    arxiv="1608.03983",
)
class Cosine(Schedule):
    """Half a cosine: flat at both ends."""

    def curve(self, t: float) -> float:
        """``(1 - cos(pi t)) / 2``."""
        return (1 - math.cos(math.pi * t)) / 2


@register(
    "schedule",
    "cubic",
    family="schedule",
    paper="To prune, or not to prune (automated gradual pruning)",
    arxiv="1710.01878",
)
class Cubic(Schedule):
    """Fast first, slow at the end, as in automated gradual pruning: ``end + (start - end) (1 - t)^3``."""

    def curve(self, t: float) -> float:
        """``1 - (1 - t)^3``."""
        return 1 - (1 - t) ** 3


@register("schedule", "exponential", family="schedule")
@dataclass(frozen=True)
class Exponential(Schedule):
    """Decay (or growth) at a constant rate: the distance to ``end`` is multiplied by ``floor`` from begin to finish.

    Args:
        floor: Share of the distance that is left just before ``finish``, in (0, 1); at ``finish`` the value is ``end``.
    """

    floor: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.floor < 1:
            raise LossplugError(f"floor is {self.floor}, allowed is (0, 1)", where="Exponential")

    def curve(self, t: float) -> float:
        """``1 - floor^t``."""
        return 1 - self.floor**t


@register("schedule", "constant", family="schedule")
@dataclass(frozen=True)
class Constant:
    """One value for the whole run."""

    value: float = 1.0

    def __call__(self, progress: Progress) -> float:
        """Returns the value."""
        return self.value


@register("schedule", "step", family="schedule")
@dataclass(frozen=True)
class Step:
    """A staircase: ``values = {0: 0.0, 0.5: 1.0}`` is 0 at first and 1 from half of the run on.

    Args:
        values: Point in time -> value from then on; the first point has to be 0.
        unit: ``fraction``, ``steps`` or ``epochs``.
    """

    values: dict[float, float] = field(default_factory=lambda: {0.0: 1.0})
    unit: Unit = "fraction"

    def __post_init__(self) -> None:
        if not self.values or min(self.values) != 0:
            raise LossplugError(f"values are {self.values}; the first point in time has to be 0", where="Step")
        if self.unit == "fraction" and max(self.values) > 1:
            raise LossplugError(
                f"a point in time is {max(self.values)}, a fraction ends at 1", where="Step", remedy="Set unit='steps'"
            )

    def __call__(self, progress: Progress) -> float:
        """Returns the value of the last point reached."""
        now = progress.at(self.unit)
        return self.values[max(point for point in self.values if point <= now)]


AnySchedule = Schedule | Constant | Step


def as_schedule(value: float | AnySchedule) -> AnySchedule:
    """Returns a schedule; a number is constant."""
    return Constant(float(value)) if isinstance(value, (int, float)) else value
