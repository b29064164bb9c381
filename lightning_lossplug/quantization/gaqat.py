"""Gradient-adaptive scales: a gate that drops one half of a scale's gradient while its direction has settled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_choice, check_range
from lightning_lossplug.quantization.technique import QATSettings, QATTechnique
from lightning_lossplug.schedules import Progress
from lightning_lossplug.surgery.shards import local


def gradient_disorder(signs: Tensor) -> Tensor:
    r"""Returns how often each sequence of signs flips: :math:`\frac{1}{K-1}\sum_j 1[s_j \ne s_{j+1}]`, in [0, 1].

    0.5 is what noise gives; a stream with P(+) = p gives 2p(1-p).

    Args:
        signs: [K, n] with K >= 2, entries -1, 0 and 1.

    Raises:
        LossplugError: Fewer than two signs.

    Source: GAQAT, arXiv 2412.05551.
    """
    if signs.ndim < 1 or signs.shape[0] < 2:
        raise LossplugError(f"signs have shape {tuple(signs.shape)}, at least two are needed", where="gaqat")
    return (signs[1:] != signs[:-1]).double().mean(0)


@dataclass(frozen=True)
class GradientAdaptiveSettings(QATSettings):
    """Settings of :class:`GradientAdaptiveTechnique`, on top of those of QAT.

    Args:
        sharpness: ``sagm`` or ``sam``.
        rho: Radius of the second pass, >= 0.
        alpha: SAGM's step down before the step up, >= 0.
        disorder_window: Optimizer steps K between two decisions, >= 8.
        disorder_threshold: Scales whose disorder is below it are frozen; 0 never, above 1 always.
        freeze_fraction: Freeze this share of the scales, those with the least disorder, instead.
        freeze_target: The half that a frozen scale loses: ``task``, ``smooth`` or ``both``.
        unfreeze: Decide anew at every window; else frozen is for good.
        perturb_scales: Move scales too in the second pass.
        start_step: First optimizer step at which anything may freeze.
        zero_sign: A zero gradient keeps the ``previous`` sign, or is a sign of its own (``zero``).
        replay: Micro-batches of an accumulation that the second pass repeats: ``all`` or the ``last``.
        layer_logs: Log the disorder of every layer.
    """

    bits_w: float | None = 4
    bits_a: int | None = 4
    sharpness: Literal["sagm", "sam"] = "sagm"
    rho: float = 0.05
    alpha: float = 0.001
    disorder_window: int = 100
    disorder_threshold: float = 0.3
    freeze_fraction: float | None = None
    freeze_target: Literal["task", "smooth", "both"] = "task"
    unfreeze: bool = True
    perturb_scales: bool = False
    start_step: int = 0
    zero_sign: Literal["previous", "zero"] = "previous"
    replay: Literal["all", "last"] = "all"
    layer_logs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "GradientAdaptiveQAT"
        check_choice(where, "sharpness", self.sharpness, ("sagm", "sam"))
        check_choice(where, "freeze_target", self.freeze_target, ("task", "smooth", "both"))
        check_choice(where, "zero_sign", self.zero_sign, ("previous", "zero"))
        check_choice(where, "replay", self.replay, ("all", "last"))
        for name in ("rho", "alpha", "disorder_threshold", "start_step"):
            check_range(where, name, getattr(self, name), 0)
        check_range(where, "disorder_window", self.disorder_window, 8)
        if self.freeze_fraction is not None:
            check_range(where, "freeze_fraction", self.freeze_fraction, 0, 1)


HISTORY = 512  # windows that are kept for the picture


class GradientGate:
    """Counts sign flips of the task gradients of n scales and decides, once per window, which are frozen.

    Every entry of a per-channel scale counts as a scale of its own.

    Args:
        settings: Window, threshold and the other options.
        sizes: Number of entries of each scale, by name.
    """

    def __init__(self, settings: GradientAdaptiveSettings, sizes: dict[str, int]) -> None:
        self.settings, self.sizes = settings, sizes
        n = sum(sizes.values())
        self.flips = torch.zeros(n, dtype=torch.int32)
        self.last = torch.zeros(n, dtype=torch.int8)
        self.frozen = torch.zeros(n, dtype=torch.bool)
        self.disorder = torch.full((n,), float("nan"))  # of the last full window
        self.conflict = torch.zeros(())  # share of the last step's scales whose two halves disagree in sign
        self.fill = 0
        # Step and mean disorder of every scale, of each window; of a long run, of every stride-th.
        self.history: list[tuple[int, list[float]]] = []
        self.windows, self.stride = 0, 1

    def to(self, device: torch.device) -> None:
        """Moves the counts."""
        for name in ("flips", "last", "frozen", "disorder", "conflict"):
            setattr(self, name, getattr(self, name).to(device))

    @torch.no_grad()
    def combine(self, task: Tensor, smooth: Tensor, step: int) -> Tensor:
        """Records one step's gradients and returns what the optimizer gets.

        Args:
            task: [n], gradients of the first pass.
            smooth: [n], gradients of the second pass.
            step: Optimizer steps taken before this one.

        Returns:
            The mean of both with a frozen half left out, [n].
        """
        self.to(task.device)
        opened = ~self.frozen
        if self.settings.freeze_target == "task":
            combined = (torch.where(opened, task, 0.0) + smooth) / 2
        elif self.settings.freeze_target == "smooth":
            combined = (task + torch.where(opened, smooth, 0.0)) / 2
        else:
            combined = torch.where(opened, (task + smooth) / 2, 0.0)
        self.conflict = (task.sign() * smooth.sign() < 0).float().mean()
        self._record(task, step)
        return combined

    def _record(self, task: Tensor, step: int) -> None:
        sign = task.sign().to(torch.int8)
        if self.settings.zero_sign == "previous":
            sign = torch.where(sign == 0, self.last, sign)
        if self.fill:
            flipped = sign != self.last
            if self.settings.zero_sign == "previous":
                flipped &= self.last != 0  # nothing was known before: no flip
            self.flips += flipped
        self.last = sign
        self.fill += 1
        if self.fill == self.settings.disorder_window:
            self._decide(step + 1)

    def _decide(self, step: int) -> None:
        self.disorder = self.flips.float() / (self.settings.disorder_window - 1)
        self.fill = 0
        self.flips.zero_()
        self._remember(step)
        if step < self.settings.start_step:
            return
        if self.settings.freeze_fraction is not None:
            count = int(self.settings.freeze_fraction * len(self.disorder))
            chosen = torch.argsort(self.disorder, stable=True)[:count]
            frozen = torch.zeros_like(self.frozen)
            frozen[chosen] = True
        else:
            frozen = self.disorder < self.settings.disorder_threshold
        self.frozen = frozen if self.settings.unfreeze else frozen | self.frozen

    def _remember(self, step: int) -> None:
        self.windows += 1
        if self.windows % self.stride == 0:
            self.history.append((step, list(self.by_scale().values())))
        if len(self.history) > HISTORY:  # it is in every checkpoint
            self.history, self.stride = self.history[1::2], 2 * self.stride

    def by_scale(self) -> dict[str, float]:
        """Returns the mean disorder of each scale in the last full window; empty before the first."""
        if not self.sizes or bool(self.disorder.isnan().any()):
            return {}
        parts = self.disorder.split(list(self.sizes.values()))
        return {name: float(part.mean()) for name, part in zip(self.sizes, parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Counts and decisions, as tensors, with the names they belong to."""
        tensors = {name: getattr(self, name).cpu().clone() for name in ("flips", "last", "frozen", "disorder")}
        past = {"history": list(self.history), "windows": self.windows, "stride": self.stride}
        return {"sizes": dict(self.sizes), "fill": self.fill, **past, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            LossplugError: The scales are others.
        """
        if state["sizes"] != self.sizes:
            other = sorted(set(state["sizes"].items()) ^ set(self.sizes.items()))[0][0]
            raise LossplugError(
                "the checkpoint holds other scales",
                where=f"GradientAdaptiveQAT: {other}",
                remedy="Resume with the settings and model of the first run",
            )
        self.fill, self.history = state["fill"], list(state["history"])
        self.windows, self.stride = state["windows"], state["stride"]
        for name in ("flips", "last", "frozen", "disorder"):
            setattr(self, name, state[name].clone())


class GradientAdaptiveTechnique(QATTechnique[GradientAdaptiveSettings]):
    """QAT whose scales get a task and a flatness gradient, kept apart and gated; the two passes are the caller's."""

    name = "GradientAdaptiveQAT"

    def __init__(self, settings: GradientAdaptiveSettings) -> None:
        super().__init__(settings)
        self._gate: GradientGate | None = None
        self._restored: dict[str, Any] | None = None
        self.step = 0

    @property
    def gate(self) -> GradientGate:
        """The gate, made for the scales that are attached.

        Raises:
            LossplugError: No scale is trained.
        """
        if self._gate is None:
            sizes = {name: scale.numel() for name, scale in self.named_scales().items()}
            if not sizes:
                raise LossplugError(
                    "there is no learned scale to adapt", where=self.name, remedy="Use lsq, lsq_plus, pact or paretoq"
                )
            self._gate = GradientGate(self.settings, sizes)
            if self._restored is not None:
                self._gate.load_state_dict(self._restored)
                self._restored = None
        return self._gate

    def combine(self, task: dict[str, Tensor], smooth: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the gradients of all scales from those of the two passes, and records the step.

        Args:
            task: Gradients of the first pass by the names of :meth:`named_scales`, whole; missing ones count as zero.
            smooth: Those of the second pass.
        """
        scales = self.named_scales()
        flat = [
            torch.cat([grads[n].flatten() if n in grads else local(s).new_zeros(s.numel()) for n, s in scales.items()])
            for grads in (task, smooth)
        ]
        combined = self.gate.combine(flat[0], flat[1], self.step)
        parts = combined.split([s.numel() for s in scales.values()])
        return {n: part.reshape(s.shape) for (n, s), part in zip(scales.items(), parts, strict=True)}

    def advance(self, progress: Progress) -> None:
        """See :meth:`QATTechnique.advance`; remembers the step."""
        super().advance(progress)
        self.step = progress.step

    def reset(self) -> None:
        """Starts the windows anew."""
        super().reset()
        self._gate = None

    def logs(self) -> dict[str, float | Tensor]:
        """Scale health, mean disorder, frozen share and sign conflicts; per layer where asked for."""
        gate = self.gate
        found = super().logs() | {"frozen": gate.frozen.float().mean(), "sign_conflict": gate.conflict}
        scales = gate.by_scale()
        if scales:
            found["disorder"] = gate.disorder.mean()
            if self.settings.layer_logs:
                found |= {f"disorder/{name}": value for name, value in scales.items()}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Adds the gate's counts."""
        return {**super().state_dict(), "gate": self.gate.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        super().load_state_dict(state)
        self._gate, self._restored = None, state["gate"]
