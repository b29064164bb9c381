"""Teachers that learn with the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lossplug.callbacks.distillation_base import Pick, Scheduled, named_teacher
from lightning_lossplug.callbacks.distillation_steps import Normalize, StepwiseDistillation
from lightning_lossplug.distillation import OnlineLoss, create
from lightning_lossplug.distillation.networks import same_weights, share
from lightning_lossplug.distillation.signals import Signals, check_teacher_logits, logits_of
from lightning_lossplug.distillation.taps import Call
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number


class OnlineDistillation(StepwiseDistillation):
    """Trains one or more teachers beside the student, each learning from the other: BD-KD, DML, KDCL, SwitOKD.

    The module stays as it is. Each step the teachers see what the student's network saw; the student's loss gets the
    method's term, every teacher its own task loss and term, one backward pass serves all, and the teachers step, with
    an optimizer like the module's, when the module's optimizer steps. They are in training mode, with their own batch
    statistics; their weights and optimizer are in the checkpoint, under the callback, and the module's keys don't
    change. Works with accumulation, clipping (each network to the same limit), bf16 and fp16, and DDP, where teachers
    are averaged over processes like the module. After the fit ``callback.teachers`` holds them.

    The teachers' task loss is the ``loss`` they return where they return one (Hugging Face models with labels), else
    cross-entropy on the targets, tokens shifted for causal language models.

    Args:
        teacher: A network, or ``timm:NAME``, ``hf:NAME``, ``checkpoint:FILE``, ``artifact:FOLDER``; or a list.
        method: Name of an online loss, or an object: ``bdkd``, ``dml``, ``kdcl``, ``switokd``.
        parameters: Parameters of a method given by name.
        teacher_kwargs: Arguments for teachers given by name.
        weight: Factor of all distillation terms: a number, a schedule, or ``{fraction of the run: value}``.
        temperature: Moves the method's temperature; None: as in ``parameters``.
        ce_weight: Factor of the module's own loss.
        teacher_ce_weight: Factor of the teachers' task loss.
        student: Path of the sub-module that returns the logits; None: the only child with parameters.
        inputs_from: Path of the sub-module whose arguments the teachers get; None: ``student``.
        output: Where the logits are in what the networks return: key, position or function; None finds them.
        targets: Key or position of the targets in the batch, or a function of it; None finds them.
        shift: Whether position t stands for token t + 1; None: for causal language models.
        task_loss: The teachers' task loss, called with a teacher's output and the batch.
        lr_scale: The teachers' learning rate over the module's (its first group's).
        optimizer: Makes the teachers' optimizer from their parameters; None: one like the module's.
        scheduler: Makes a schedule for it, stepped after each of its steps; None: it follows the module's.
        normalize: ``batch``: the distillation terms of all networks are means over the tokens of each batch of each
            process, so that a window of accumulated batches is a mean of means; ``window``: over all tokens of the
            window and all processes, exactly. That takes one more backward pass of them where batches are accumulated.
            Task losses stay the means they are.
        agreement: Log, at each validation, how often student and teacher agree and how often the teacher is right; it
            costs a forward pass of the teacher. Logits have the classes last.

    Raises:
        LossplugError: Unknown method or parameter; at setup: manual optimization, no such sub-module; at the first
            step: the student was not called, classes differ, targets are missing, NaN.
    """

    def __init__(
        self,
        teacher: nn.Module | str | Sequence[nn.Module | str],
        method: str | OnlineLoss = "bdkd",
        parameters: dict[str, Any] | None = None,
        teacher_kwargs: dict[str, Any] | None = None,
        weight: Scheduled = 1.0,
        temperature: Scheduled | None = None,
        ce_weight: Scheduled = 1.0,
        teacher_ce_weight: float = 1.0,
        student: str | None = None,
        inputs_from: str | None = None,
        output: Pick = None,
        targets: Pick = None,
        shift: bool | None = None,
        task_loss: Callable[[Any, Any], Tensor] | None = None,
        lr_scale: float = 1.0,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        normalize: Normalize = "batch",
        agreement: bool = False,
    ) -> None:
        super().__init__(
            student,
            inputs_from,
            output,
            targets,
            shift,
            weight,
            ce_weight,
            temperature,
            lr_scale,
            optimizer,
            scheduler,
            agreement,
        )
        loss = create(method, **(parameters or {})) if isinstance(method, str) else method
        if not isinstance(loss, OnlineLoss):
            raise LossplugError(
                f"{method!r} is no method for networks that learn together",
                where=self.where,
                remedy="Use bdkd, dml, kdcl or switokd; losses of a frozen teacher go with Distillation",
            )
        given = [teacher] if isinstance(teacher, (nn.Module, str)) else list(teacher)
        if not given or (loss.single and len(given) > 1):
            raise LossplugError(f"{len(given)} teachers given, {type(loss).__name__} takes one", where=self.where)
        self.loss, self.task_loss = loss, task_loss
        self.teacher_ce_weight = check_number(self.where, "teacher_ce_weight", teacher_ce_weight, least=0)
        self.teachers = nn.ModuleList([named_teacher(t, teacher_kwargs, self.where) for t in given])
        if self.temperature is not None and not hasattr(loss, "temperature"):
            raise LossplugError(f"{type(loss).__name__} has no temperature", where=self.where)
        self.set_steps(None, None, normalize, None, True)
        self._distilled = torch.zeros(())  # the part of the term that is a mean over rows
        self._learning = False  # whether a micro-batch of this window let the teachers learn
        self._first = True

    @property
    def loss_module(self) -> nn.Module:
        """The online loss."""
        return self.loss

    def networks(self) -> list[nn.Module]:
        """The teachers."""
        return list(self.teachers)

    def extras(self) -> nn.ModuleList:
        """The teachers."""
        return self.teachers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that don't keep whole networks on every process, and hooks the student."""
        if stage == "fit":
            self._refuse_sharding(trainer)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Places the teachers and makes their optimizer."""
        if not any(p.requires_grad for p in self.teachers.parameters()):
            raise LossplugError(
                "the teachers have no parameter to train", where=self.where, remedy="Use Distillation for frozen ones"
            )
        super().on_fit_start(trainer, pl_module)
        self.start_steps(trainer, pl_module)
        self._first = True
        if trainer.global_step == 0 and any(same_weights(self.student_network, t) for t in self.teachers):
            rank_zero_warn(f"{self.where}: a teacher starts with the student's weights, so there is nothing to learn")

    def term(self, trainer: Trainer, pl_module: LightningModule, call: Call, batch: Any) -> Tensor:
        """The student's term, and of each teacher its task loss and term."""
        args, kwargs = self.teacher_call()
        outputs = []
        for teacher in self.teachers:
            if not teacher.training:
                teacher.train()
            share(teacher.buffers())
            outputs.append(teacher(*args, **kwargs))
        logits = [
            logits_of(o, self.output, f"the teacher {type(t).__name__}")
            for o, t in zip(outputs, self.teachers, strict=True)
        ]
        if self._first or pl_module.device.type == "cpu":
            for z, teacher in zip(logits, self.teachers, strict=True):
                check_teacher_logits(z.detach(), f"the teacher {type(teacher).__name__}", frozen=False)
            self._first = False
        found = self.signals(call, logits, batch, self._classes_last)
        self.tell("train", found)
        index = found.target if self.loss.needs_target or found.tokens else None
        self.count(found.student, found.mask, index)
        terms = self.loss(found.student, found.teachers, index, mask=found.mask)
        weight = self.value(self.weight, trainer)
        parts = [self.normalized(part, trainer) for part in (terms.student, *terms.teachers)]
        if self.normalize == "window":
            self._distilled = weight * torch.stack(parts).sum()
        total = weight * parts[0]
        gate: Any = 1.0
        if terms.learn is not None:
            gate = terms.learn.to(terms.student.dtype)
            self._learning = self._learning or bool(terms.learn)
        else:
            self._learning = True
        tasks = [self._task(o, z, found, batch) for o, z in zip(outputs, found.teachers, strict=True)]
        for task, extra in zip(tasks, parts[1:], strict=True):
            total = total + gate * self.teacher_ce_weight * task + weight * extra
        self.logs = {
            "kd": terms.student.detach(),
            "weight": torch.tensor(weight),
            "teacher_loss": torch.stack([t.detach().float() for t in tasks]).mean(),
            **terms.logs,
        }
        return total

    def on_term(self, trainer: Trainer, term: Tensor) -> None:
        """Takes the gradients of the distillation alone, where they are asked for."""
        super().on_term(trainer, self._distilled)
        self._distilled = torch.zeros(())

    @property
    def _classes_last(self) -> bool:
        return self.loss.reduction != "pixelmean"

    def _task(self, output: Any, logits: Tensor, found: Signals, batch: Any) -> Tensor:
        if self.task_loss is not None:
            return self.task_loss(output, batch)
        own = getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        if found.target is None:
            raise LossplugError(
                "the batch has no targets for the teachers' own loss",
                where=self.where,
                remedy="Say targets=KEY, or give task_loss, a function of a teacher's output and the batch",
            )
        z = logits.movedim(-1, 1) if found.tokens and self._classes_last else logits
        return F.cross_entropy(z.float() if z.dtype in (torch.float16, torch.bfloat16) else z, found.target)

    def aux_steps(self) -> bool:
        """Whether a micro-batch of the window let the teachers learn."""
        learning, self._learning = self._learning, False
        return learning

    def state_dict(self) -> dict[str, Any]:
        """Also whether the unfinished window let the teachers learn."""
        return {**super().state_dict(), "learning": self._learning}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps :meth:`state_dict` until the objects exist."""
        super().load_state_dict(state_dict)
        self._learning = bool(state_dict.get("learning", False))
