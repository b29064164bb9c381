"""What the distillation callbacks share: taps on the student, one added term, extras with their own optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lightning_lossplug.callbacks.distillation_extras import ExtrasCallback
from lightning_lossplug.callbacks.teacher_agreement import AgreementLog
from lightning_lossplug.distillation.base import check_temperature
from lightning_lossplug.distillation.networks import check_apart
from lightning_lossplug.distillation.sample_ids import Identified
from lightning_lossplug.distillation.signals import Signals, align, logits_of, predicts_next_token, targets_of
from lightning_lossplug.distillation.taps import Call, Tap, all_armed, find_student
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import registry
from lightning_lossplug.schedules import AnySchedule, Constant, Progress, Step, as_schedule
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method

TERM_ORDER = 50  # outside a swapped loss (100): the term is added to whatever the step's loss has become
Scheduled = float | AnySchedule | dict[float, float]
Pick = int | str | Callable[[Any], Any] | None


def weight_of(value: Scheduled, where: str, name: str) -> AnySchedule:
    """Returns a schedule of weights: of a number, of ``{fraction of the run: value}``, or itself.

    Raises:
        LossplugError: A number is negative.
    """
    numbers: list[Any] = list(value.values()) if isinstance(value, dict) else [value]
    for number in numbers:
        if isinstance(number, (int, float)):
            check_number(where, name, number, least=0)
    return schedule_of(value)


def schedule_of(value: Scheduled) -> AnySchedule:
    """Returns a schedule: of a number, of ``{fraction of the run: value}``, or itself."""
    return Step(value) if isinstance(value, dict) else as_schedule(value)


def named_teacher(teacher: nn.Module | str, options: dict[str, Any] | None, where: str) -> nn.Module:
    """Returns a network: the given one, or one by name (``KIND:NAME``, kinds in ``lossplug list teachers``).

    Raises:
        LossplugError: Unknown kind, or options beside a module.
    """
    if isinstance(teacher, nn.Module):
        if options:
            raise LossplugError("teacher_kwargs go with a teacher given by name", where=where)
        return teacher
    kind, colon, name = teacher.partition(":")
    if not colon:
        raise LossplugError(
            f"the teacher {teacher!r} has no kind",
            where=where,
            remedy="Write timm:NAME, hf:NAME, checkpoint:FILE, artifact:FOLDER or cache:FOLDER",
        )
    with torch.random.fork_rng(devices=[]):  # the student's run draws the same numbers with and without a teacher
        return registry.get("teacher", kind).load()(name, **(options or {}))


class DistillationCallback(AgreementLog, ExtrasCallback):
    """Adds a term to the loss of an unedited module; the base of the distillation callbacks.

    Networks it brings are kept outside the module: not in its checkpoint keys, not in its optimizer, not switched by
    its ``train()``. What is trainable among them gets gradients from the one backward pass and is stepped by an
    optimizer of its own when the module's optimizer steps.
    """

    def __init__(
        self,
        student: str | None,
        inputs_from: str | None,
        output: Pick,
        targets: Pick,
        shift: bool | None,
        weight: Scheduled,
        ce_weight: Scheduled,
        temperature: Scheduled | None,
        lr_scale: float = 1.0,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        agreement: bool = False,
    ) -> None:
        super().__init__(lr_scale, optimizer, scheduler)
        self.student, self.inputs_from = student, inputs_from
        self.output, self.targets, self.shift = output, targets, shift
        self.weight = weight_of(weight, self.where, "weight")
        self.ce_weight = weight_of(ce_weight, self.where, "ce_weight")
        self.temperature = None if temperature is None else schedule_of(temperature)
        self.agreement = agreement
        self.observers = {"train": [], "val": []}
        self.logs: dict[str, Tensor] = {}
        self._student_tap: Tap | None = None
        self._input_tap: Tap | None = None
        self._taps: list[Tap] = []
        self._handles: list[RemovableHandle] = []
        self._stepped = False
        self._shifts = False
        self._sample_ids: Tensor | None = None

    # --- what a subclass says ---

    @abstractmethod
    def term(self, trainer: Trainer, pl_module: LightningModule, call: Call, batch: Any) -> Tensor:
        """Returns what is added to the loss, unlogged parts in ``self.logs``."""

    @property
    @abstractmethod
    def loss_module(self) -> nn.Module:
        """The loss whose temperature a schedule moves."""

    def rewrite(self, trainer: Trainer, batch: Any) -> tuple[Any, bool]:
        """Returns the batch of the step, and whether the student wrote it: then the module's loss doesn't count."""
        return batch, False

    def on_term(self, trainer: Trainer, term: Tensor) -> None:
        """Gets the term before the backward pass."""

    def feature_taps(self, root: nn.Module) -> list[Tap]:
        """Further taps on the student's network."""
        return []

    # --- set-up ---

    @property
    def state_key(self) -> str:
        """Identifies the instance by the sub-module it reads."""
        return self._generate_state_key(student=self.student, loss=type(self.loss_module).__name__)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hooks the student and wraps the training step of a fit."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise LossplugError(
                "needs automatic optimization: in manual optimization the value that training_step returns is never "
                "differentiated",
                where=self.where,
                remedy="Call the loss in training_step: lightning_lossplug.distillation.create(...)",
            )
        self.forget_run()
        self._detach(pl_module)
        if not is_overridden("configure_model", pl_module):
            self._attach(pl_module)
        wrap_method(pl_module, "training_step", self, self._training_step(trainer, pl_module), order=TERM_ORDER)

    def _path(self, pl_module: LightningModule) -> str:
        return find_student(pl_module, self.student, self.where)

    def _attach(self, pl_module: LightningModule) -> None:
        path = self._path(pl_module)
        self._student_tap = Tap(pl_module, path, self.where)
        self._input_tap = None if self.inputs_from is None else Tap(pl_module, self.inputs_from, self.where)
        self._taps = [t for t in (self._student_tap, self._input_tap) if t is not None]
        self._taps += self.feature_taps(self._student_tap.module)
        self._shifts = predicts_next_token(self._student_tap.module) if self.shift is None else self.shift

    @property
    def student_network(self) -> nn.Module:
        """The network that is read."""
        assert self._student_tap is not None
        return self._student_tap.module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Places the networks, and restores them where a run is resumed."""
        if self._student_tap is None:
            self._attach(pl_module)
        check_apart(pl_module, self.networks(), self.where)
        for network in self.networks():
            self._place(trainer, pl_module, network)
        self.loss_module.to(pl_module.device)
        if any(True for _ in self.extras().parameters()):
            self._prepare(trainer)
        for optimizer in trainer.optimizers[:1]:
            self._handles.append(optimizer.register_step_post_hook(self._on_step))
        wrap_method(pl_module, "optimizer_step", self, self._optimizer_step)

    def _place(self, trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> None:
        network.to(pl_module.device)
        quantised = getattr(network, "quantization_method", None) is not None  # transformers refuses to cast those
        if isinstance(trainer.precision_plugin, (HalfPrecision, DoublePrecision)) and not quantised:
            trainer.precision_plugin.convert_module(network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the schedules, or goes on."""
        super().on_train_start(trainer, pl_module)
        if not self._restored and trainer.global_step == 0:
            self.step = 0

    # --- one step ---

    def progress(self, trainer: Trainer) -> Progress:
        """Returns where training stands, in steps the optimizer took."""
        total = trainer.estimated_stepping_batches
        batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
        return Progress(
            self.step,
            int(total) if total != float("inf") else None,
            batches / window if batches != float("inf") else None,
        )

    def value(self, schedule: AnySchedule, trainer: Trainer) -> float:
        """Returns the value of a schedule now."""
        return schedule.value if isinstance(schedule, Constant) else schedule(self.progress(trainer))

    def _training_step(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        def training_step(inner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._sample_ids = None
            if isinstance(batch, Identified):  # the module gets the batch it knows
                batch, self._sample_ids = batch
            batch, own = self.rewrite(trainer, batch)
            with all_armed(self._taps):
                output = inner(batch, *args, **kwargs)
            if output is None:
                return None
            if self.temperature is not None:
                now = check_temperature(self.where, self.value(self.temperature, trainer))
                self.loss_module.temperature = now  # type: ignore[assignment]
            assert self._student_tap is not None
            loss = output["loss"] if isinstance(output, dict) else output
            total = self.term(trainer, pl_module, self._student_tap.last(), batch)
            self.on_term(trainer, total)
            ce = 0.0 if own else self.value(self.ce_weight, trainer)
            total = (loss if ce == 1 else ce * loss) + total
            for tap in self._taps:
                tap.forget()
            return {**output, "loss": total} if isinstance(output, dict) else total

        return training_step

    def signals(self, call: Call, teachers: list[Tensor], batch: Any, classes_last: bool = True) -> Signals:
        """Returns student and teacher logits with targets and mask, shifted for causal language models."""
        logits = logits_of(call.output, self.output, f"the student {self._student_tap.path!r}")  # type: ignore[union-attr]
        self._check_widths(logits, teachers, classes_last)
        target = targets_of(batch, call.kwargs, self.targets)
        return align(logits, teachers, target, call.kwargs.get("attention_mask"), self._shifts, classes_last)

    def _check_widths(self, student: Tensor, teachers: list[Tensor], classes_last: bool) -> None:
        dim = -1 if classes_last else 1
        for network, z in zip(self.networks(), teachers, strict=True):
            if z.ndim == student.ndim and z.shape[dim] != student.shape[dim]:
                if getattr(self, "any_vocabulary", False):
                    continue
                raise LossplugError(
                    f"the student {self._student_tap.path!r} ({type(self.student_network).__name__}) has "  # type: ignore[union-attr]
                    f"{student.shape[dim]} outputs, the teacher ({type(network).__name__}) {z.shape[dim]}",
                    where=self.where,
                    remedy="Both need the same classes or vocab_size (which is not the length of the tokenizer)",
                )

    def logits(self, network: nn.Module, output: Any) -> Tensor:
        """Returns the logits in what a teacher returned."""
        return logits_of(output, self.output, f"the teacher {type(network).__name__}")

    def teacher_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments the student's network (or ``inputs_from``) was called with, outside its graph."""
        tap = self._input_tap or self._student_tap
        assert tap is not None
        call = tap.last()
        return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (call.args, dict(call.kwargs)))

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True

    def _optimizer_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self._stepped = False  # torch takes a step of its own where it loads a sharded state
        result = inner(*args, **kwargs)
        if self._stepped:  # a GradScaler may have skipped it
            self.step += 1
            self.after_step()
        return result

    def after_step(self) -> None:
        """Runs after each step the module's optimizer took, and after every other technique's work on the weights."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms when the Trainer's loggers are due."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and self.logs:
            values = {f"{self.where}/{key}": value for key, value in self.logs.items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)  # type: ignore[arg-type]

    # --- the end ---

    def _detach_taps(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._student_tap, self._input_tap, self._taps = None, None, []

    def _detach(self, pl_module: LightningModule) -> None:
        for method in ("training_step", "configure_gradient_clipping", "optimizer_step"):
            unwrap_method(pl_module, method, self)
        self._detach_taps()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes hooks and patches off; the teachers stay with the callback."""
        self._detach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        self._detach(pl_module)

    def say(self, text: str) -> None:
        """Prints a line, once for all processes."""
        rank_zero_info(f"{self.where}: {text}")
