"""What ran when: what the callbacks of this library do in a training step, in the order in which they do it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import registry
from lightning_lossplug.surgery.chain import watch_chains

PHASES = ("loss", "structure", "sparsity", "quantization", "distillation", "kv_cache", "robustness", "communication")
HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_end",
    "on_save_checkpoint",
    "on_train_end",
)
TECHNIQUE = ("before_step", "after_step", "advance")


class StepTrace(Callback):
    """Prints which technique did what in a step, in the order in which it happened, and again whenever that changes.

    At the start of the fit it lists the techniques by phase (loss, structure, sparsity, quantisation, distillation and
    what comes after), which is their order whatever the order of the list. Then a line per event: a wrapped method of
    the module (``training_step``, from the outermost to the innermost), a hook of Lightning, or a call of a technique
    (``advance`` moves its schedule). Other callbacks are not shown. After the fit ``events`` holds all that was seen.

    Args:
        steps: Optimizer steps to watch from the start of the fit (also of a resumed one), >= 1; the end of the fit is
            always watched. A step like the one before is not printed again.

    Raises:
        LossplugError: ``steps`` below 1.
    """

    def __init__(self, steps: int = 3) -> None:
        self.steps = int(check_number("StepTrace", "steps", steps, least=1))
        self.events: list[tuple[int, str, str]] = []
        self._undo: list[Callable[[], None]] = []
        self._seen: list[str] = []
        self._shown: list[str] = []
        self._first = 0
        self._watching = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lists the techniques by phase and begins to watch."""
        self.events, self._seen, self._shown = [], [], []
        self._first, self._watching = trainer.global_step, True
        ours = [c for c in trainer.callbacks if _is_ours(c) and c is not self]  # type: ignore[attr-defined]
        names = {type(c).__name__ for c in ours}
        families: dict[str, list[str]] = {phase: [] for phase in PHASES}
        for entry in registry:
            if entry.kind == "callback" and entry.name in names:
                families.setdefault(entry.family, []).append(entry.name)
        shown = (f"  {phase:14} {', '.join(found)}" for phase, found in families.items() if found)
        rank_zero_info("\n".join(["StepTrace: techniques by phase, whatever the order of the list", *shown]))
        for callback in ours:
            for hook in HOOKS:
                if is_overridden(hook, callback, Callback):
                    self._watch(callback, hook, trainer, hook, type(callback).__name__)
            technique = getattr(callback, "technique", None)
            for name in TECHNIQUE if technique is not None else ():
                if callable(getattr(technique, name, None)):
                    self._watch(technique, name, trainer, f"technique.{name}", type(callback).__name__)
        self._undo.append(watch_chains(functools.partial(self._chained, trainer)))

    def _watch(self, owner: Any, method: str, trainer: Trainer, what: str, who: str) -> None:
        inner = getattr(owner, method)

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._note(trainer, what, who)
            return inner(*args, **kwargs)

        setattr(owner, method, call)
        self._undo.append(lambda: vars(owner).pop(method, None))

    def _chained(self, trainer: Trainer, method: str, key: object) -> None:
        if _is_ours(key):
            self._note(trainer, method, type(key).__name__)

    def _note(self, trainer: Trainer, what: str, who: str) -> None:
        if self._watching or what == "on_train_end":
            self.events.append((trainer.global_step, what, who))
            self._seen.append(f"{what}: {who}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints what the batch did, unless it is what the one before did."""
        self._print(trainer.global_step)
        self._watching = trainer.global_step - self._first < self.steps

    def _print(self, step: int) -> None:
        lines, self._seen = self._seen, []
        if lines and lines != self._shown:
            self._shown = lines
            rank_zero_info("\n".join([f"StepTrace: to step {step}", *(f"  {line}" for line in lines)]))

    def _stop(self) -> None:
        for undo in self._undo[::-1]:
            undo()
        self._undo.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints what is left and takes the watches off."""
        self._print(trainer.global_step)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the watches off after an exception, when ``teardown`` is not called."""
        self._stop()


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("lightning_lossplug.callbacks.")
