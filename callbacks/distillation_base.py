"""What the distillation callbacks share: taps on the student, one added term, extras with their own optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lightning_lossplug.distillation.networks import check_apart, several_processes, share
from lightning_lossplug.distillation.optimizer import AuxiliaryOptimizer
from lightning_lossplug.distillation.signals import Signals, align, logits_of, predicts_next_token, targets_of
from lightning_lossplug.distillation.taps import Call, Tap, all_armed, find_student
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import registry
from lightning_lossplug.schedules import AnySchedule, Constant, Progress, Step, as_schedule
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method

TERM_ORDER = 50  # outside a swapped loss (100): the term is added to whatever the step's loss has become
Scheduled = float | AnySchedule | dict[float, float]
Pick = int | str | Callable[[Any], Any] | None


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
            remedy="Write timm:NAME, hf:NAME, checkpoint:FILE or artifact:FOLDER",
        )
    with torch.random.fork_rng():  # the student's run draws the same numbers with and without a teacher
        return registry.get("teacher", kind).load()(name, **(options or {}))


class DistillationCallback(Callback):
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
    ) -> None:
        self.where = type(self).__name__
        self.student, self.inputs_from = student, inputs_from
        self.output, self.targets, self.shift = output, targets, shift
        self.weight, self.ce_weight = schedule_of(weight), schedule_of(ce_weight)
        self.temperature = None if temperature is None else schedule_of(temperature)
        self.lr_scale, self.optimizer, self.scheduler = lr_scale, optimizer, scheduler
        self.step = 0
        self.aux: AuxiliaryOptimizer | None = None
        self.logs: dict[str, Tensor] = {}
        self._student_tap: Tap | None = None
        self._input_tap: Tap | None = None
        self._taps: list[Tap] = []
        self._saved: dict[str, Any] | None = None
        self._restored = False
        self._open = False  # gradients of an unfinished accumulation are held
        self._handles: list[RemovableHandle] = []
        self._shifts = False

    # --- what a subclass says ---

    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """The teachers."""

    @abstractmethod
    def extras(self) -> nn.ModuleList:
        """Everything that is trained, or changes, and belongs into the checkpoint."""

    @abstractmethod
    def term(self, trainer: Trainer, pl_module: LightningModule, call: Call, batch: Any) -> Tensor:
        """Returns what is added to the loss, unlogged parts in ``self.logs``."""

    @property
    @abstractmethod
    def loss_module(self) -> nn.Module:
        """The loss whose temperature a schedule moves."""

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
        self._restored, self._saved, self.aux, self._open = False, None, None, False
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
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _place(self, trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> None:
        network.to(pl_module.device)
        if isinstance(trainer.precision_plugin, HalfPrecision):
            trainer.precision_plugin.convert_module(network)

    def _prepare(self, trainer: Trainer) -> None:
        """Restores the extras and makes their optimizer; called once they exist."""
        extras = self.extras()
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise LossplugError(
                f"a network that changes in training is not supported with {type(trainer.strategy).__name__}",
                where=self.where,
                remedy="Use one device or DDP, or a frozen teacher",
            )
        saved = self._saved
        if saved is not None:
            self._load(extras, saved["extras"])
        share([*(p.data for p in extras.parameters()), *extras.buffers()])
        trained = [p for p in extras.parameters() if p.requires_grad]
        if saved is not None and set(saved["extras"]) <= set(extras.state_dict()):
            self._saved = None  # else a part of it is made, and restored, at the first step
        if not trained:
            return
        self.aux = AuxiliaryOptimizer(trained, trainer.optimizers[0], self.optimizer, self.lr_scale, self.scheduler)
        if saved is not None:
            self.aux.load_state_dict(saved)
            if saved.get("gradients"):
                self.aux.set_gradients(saved["gradients"][dist.get_rank() if several_processes() else 0])
                self._open = True

    def _load(self, extras: nn.ModuleList, saved: dict[str, Tensor]) -> None:
        now = extras.state_dict()
        odd = [k for k, v in now.items() if k not in saved or saved[k].shape != v.shape]
        if odd:
            raise LossplugError(
                f"the checkpoint was written with other networks: {odd[0]!r} doesn't fit",
                where=self.where,
                remedy="Resume with the teachers and losses the run was started with",
            )
        extras.load_state_dict({k: saved[k] for k in now})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the schedules, or goes on."""
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
            with all_armed(self._taps):
                output = inner(batch, *args, **kwargs)
            if output is None:
                return None
            if self.temperature is not None:
                self.loss_module.temperature = self.value(self.temperature, trainer)  # type: ignore[assignment]
            assert self._student_tap is not None
            loss = output["loss"] if isinstance(output, dict) else output
            total = self.term(trainer, pl_module, self._student_tap.last(), batch)
            ce = self.value(self.ce_weight, trainer)
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

    def teacher_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments the student's network (or ``inputs_from``) was called with, outside its graph."""
        tap = self._input_tap or self._student_tap
        assert tap is not None
        call = tap.last()
        return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (call.args, dict(call.kwargs)))

    # --- the auxiliary optimizer, in step with the trainer's ---

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drops the extras' gradients: at the first micro-batch of a window only."""
        if self.aux is not None:
            self.aux.zero_grad()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gradients are held now."""
        self._open = True

    def aux_steps(self) -> bool:
        """Whether the extras take this step."""
        return True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Steps the extras: averaged over processes, unscaled and clipped as the module's own gradients are."""
        self._open = False
        if self.aux is None or not self.aux_steps():
            return
        limit, how = trainer.gradient_clip_val, trainer.gradient_clip_algorithm

        def clip(parameters: list[nn.Parameter]) -> None:
            if how is not None and str(getattr(how, "value", how)) == "value":
                nn.utils.clip_grad_value_(parameters, float(limit))  # type: ignore[arg-type]
            else:
                nn.utils.clip_grad_norm_(parameters, float(limit))  # type: ignore[arg-type]

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.aux.step(scaler, clip if limit else None)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        self.after_step()

    def after_step(self) -> None:
        """Runs after each step the module's optimizer took."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms when the Trainer's loggers are due."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and self.logs:
            values = {f"{self.where}/{key}": value for key, value in self.logs.items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)  # type: ignore[arg-type]

    # --- checkpoint ---

    def state_dict(self) -> dict[str, Any]:
        """The clock and, where there are extras, their weights and optimizer, in plain types."""
        extras = dict(self.extras().state_dict())
        return {"step": self.step, "extras": extras, **({} if self.aux is None else self.aux.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps :meth:`state_dict` until the objects exist."""
        self.step, self._restored = state_dict["step"], True
        self._saved = state_dict if state_dict["extras"] else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the extras' gradients of an unfinished accumulation, of every process."""
        if self.aux is None or not self._open:
            return
        ranks: list[Any] = [self.aux.gradients()]
        if several_processes():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, self.aux.gradients())
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            state["gradients"] = ranks

    # --- the end ---

    def _detach_taps(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._student_tap, self._input_tap, self._taps = None, None, []

    def _detach(self, pl_module: LightningModule) -> None:
        unwrap_method(pl_module, "training_step", self)
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
