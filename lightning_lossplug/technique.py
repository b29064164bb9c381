"""The life of a technique: a plain object that works on a model, with or without a Trainer.

A bare PyTorch loop drives it like this; :class:`lightning_lossplug.callbacks.TechniqueCallback` does the same from the
hooks of a Trainer::

    technique.attach(model)
    technique.advance(Progress(0, total_steps))
    for step in range(total_steps):
        loss = ...; loss.backward()
        technique.before_step(optimizer)
        optimizer.step(); optimizer.zero_grad()
        technique.after_step(optimizer)
        technique.advance(Progress(step + 1, total_steps))
    plain = technique.fold(model)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lossplug.schedules import Progress
from lightning_lossplug.surgery.plug import fold
from lightning_lossplug.surgery.select import Selection

SettingsT = TypeVar("SettingsT")


class Technique(ABC, Generic[SettingsT]):
    """Something done to a model while it trains.

    Args:
        settings: A frozen dataclass of plain values; the same fields in Python, YAML and on the command line.
    """

    name: str

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings

    @abstractmethod
    def attach(self, model: nn.Module) -> Selection:
        """Changes the model so that the technique can work; calling it again adds what is new and keeps the rest.

        Returns:
            What was taken and what was left out, with reasons. Nothing taken is not an error here, since a model may
            build its layers later.

        Raises:
            LossplugError: The settings don't fit the model.
        """

    @abstractmethod
    def advance(self, progress: Progress) -> None:
        """Moves to a point of training: before the first step and after every optimizer step.

        Calling it twice for the same point changes nothing, so a resumed run may repeat it.
        """

    def before_step(self, optimizer: Optimizer, grad_scale: float = 1.0) -> None:
        """Works on final gradients (synchronised, clipped), just before the optimizer uses them.

        Args:
            optimizer: The optimizer.
            grad_scale: Factor that is still on the gradients: a fused optimizer takes the loss scale out by itself.
        """

    def after_step(self, optimizer: Optimizer) -> None:
        """Works on weights just after ``optimizer.step``."""

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """Gives the model back its own classes, with the latent weights, unfolded."""

    def fold(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Returns the model with every plugged weight folded, a copy by default; see :func:`surgery.fold`."""
        return fold(model, inplace=inplace)

    def reset(self) -> None:
        """Forgets the position in the schedule, for a new run with the same object."""

    def logs(self) -> dict[str, float | Tensor]:
        """Returns what is worth a curve now: schedule values and health signals."""
        return {}

    def finish(self) -> list[str]:
        """Returns warnings at the end of training (a ramp longer than the run, say)."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the schedule, in plain types; tensors live in the model's buffers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
