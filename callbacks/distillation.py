"""Teachers that are frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lossplug.callbacks.distillation_base import (
    DistillationCallback,
    Pick,
    Scheduled,
    named_teacher,
    schedule_of,
)
from lightning_lossplug.callbacks.distillation_split import SplitGradients
from lightning_lossplug.distillation import DHKD, DistillationLoss, FeatureLoss, OnlineLoss, create
from lightning_lossplug.distillation.dhkd import auxiliary_head
from lightning_lossplug.distillation.large_vocabulary import OutputHead, fused_loss, fused_options, output_head
from lightning_lossplug.distillation.networks import fingerprint, freeze, to_eval
from lightning_lossplug.distillation.signals import align, check_teacher_logits, logits_of, targets_of
from lightning_lossplug.distillation.taps import INPUT, Call, Tap, all_armed
from lightning_lossplug.distillation.two_gradients import AlignScope
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice
from lightning_lossplug.registry import registry


class Distillation(DistillationCallback):
    """Adds a distillation term from a frozen teacher to an unedited module.

    The teacher is called with what the student's network was called with (the same augmented images), without
    gradients, in eval mode, under the module's precision. It stays outside the module: checkpoint keys, optimizer and
    ``train()`` don't see it, and it is not saved; its fingerprint is, so that resuming with another one is an error.
    Features are read by path on both sides. What a loss trains itself (regressors of ``fitnet``, the second head of
    ``dhkd``) has an optimizer like the module's, stepping with it, and is in the checkpoint under the callback.

    Args:
        teacher: A network, or ``timm:NAME``, ``hf:NAME``, ``checkpoint:FILE``, ``artifact:FOLDER``.
        loss: Name of a loss of logits, or an object; null for features only.
        parameters: Parameters of a loss given by name.
        teacher_kwargs: Arguments for a teacher given by name.
        weight: Factor of the loss: a number, a schedule, or ``{fraction of the run: value}``.
        temperature: Moves the loss's temperature; None: as in ``parameters``.
        ce_weight: Factor of the module's own loss. The usual benchmarks have 0.1 beside 0.9 for ``kd``.
        feature_loss: Name of a loss of features, or an object.
        feature_parameters: Its parameters, if given by name.
        feature_weight: Factor of the loss of features; benchmarks: ``fitnet`` 100, ``at`` 1000, ``rkd`` 1.
        layers: Path in the student's network -> path in the teacher, ``input:PATH`` for what a layer gets.
        student: Path of the sub-module that returns the logits; None: the only child with parameters.
        inputs_from: Path of the sub-module whose arguments the teacher gets; None: ``student``.
        output: Where the logits are in what the networks return: key, position or function; None finds them.
        targets: Key or position of the targets in the batch, or a function of it; None finds them.
        shift: Whether position t stands for token t + 1; None: for causal language models.
        fused: For two Hugging Face language models of one vocabulary: compute ``kd``, ``gkd`` or ``minillm`` from the
            hidden states in chunks; the teacher's logits are never formed. With ``SwapLoss(..., fused=True)`` beside
            it the student's aren't either.
        lr_scale: Learning rate of what the losses train, over the module's.
        dot_delta: For modules trained by SGD with momentum: the steps of ``dot``, with more momentum for the
            distillation and less for the task; 0.075 to start with. One more backward pass.
        align: Project conflicts with the task out of the distillation's gradient, as ``dhkd`` may: ``all`` (as in its
            code) or ``shared``, see :func:`~lightning_lossplug.distillation.align_gradients`. One more backward pass.
        agreement: Log, at each validation, how often student and teacher agree and how often the teacher is right; it
            costs a forward pass of the teacher. Logits have the classes last.

    Raises:
        LossplugError: Unknown loss, parameter or teacher; at setup: manual optimization, paths that match nothing; at
            the first step: the student was not called, classes differ, targets are missing, the teacher's logits are
            NaN or constant.
    """

    def __init__(
        self,
        teacher: nn.Module | str,
        loss: str | DistillationLoss | None = "kd",
        parameters: dict[str, Any] | None = None,
        teacher_kwargs: dict[str, Any] | None = None,
        weight: Scheduled = 1.0,
        temperature: Scheduled | None = None,
        ce_weight: Scheduled = 1.0,
        feature_loss: str | FeatureLoss | None = None,
        feature_parameters: dict[str, Any] | None = None,
        feature_weight: Scheduled = 1.0,
        layers: dict[str, str] | None = None,
        student: str | None = None,
        inputs_from: str | None = None,
        output: Pick = None,
        targets: Pick = None,
        shift: bool | None = None,
        fused: bool = False,
        lr_scale: float = 1.0,
        dot_delta: float | None = None,
        align: AlignScope | None = None,
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
            agreement=agreement,
        )
        self.loss = create(loss, **(parameters or {})) if isinstance(loss, str) else loss
        if isinstance(self.loss, (OnlineLoss, FeatureLoss)):
            remedy = "Use OnlineDistillation" if isinstance(self.loss, OnlineLoss) else "Give it as feature_loss"
            raise LossplugError(f"{loss!r} is no loss of a frozen teacher's logits", where=self.where, remedy=remedy)
        if isinstance(feature_loss, str):
            made = create(feature_loss, **(feature_parameters or {}))
            if not isinstance(made, FeatureLoss):
                raise LossplugError(
                    f"{feature_loss!r} is no loss of features", where=self.where, remedy="Give it as loss"
                )
            feature_loss = made
        self.feature_loss, self.feature_weight = feature_loss, schedule_of(feature_weight)
        self.layers = dict(layers or {})
        if self.loss is None and feature_loss is None:
            raise LossplugError("neither loss nor feature_loss is given", where=self.where)
        if (feature_loss is not None) != bool(self.layers):
            raise LossplugError("feature_loss and layers go together", where=self.where)
        if self.temperature is not None and not hasattr(self.loss, "temperature"):
            raise LossplugError(f"{loss!r} has no temperature", where=self.where)
        self.fused = fused
        if fused:
            fused_options(self.loss)
        self.any_vocabulary = bool(self.loss is not None and _facts(self.loss).get("any_vocabulary"))
        self.teacher: nn.Module | None = self._make_teacher(teacher, teacher_kwargs)
        self.trained = nn.ModuleDict()
        if align is not None:
            check_choice(self.where, "align", align, get_args(AlignScope))
        self._split = None if dot_delta is align is None else SplitGradients(self.where, dot_delta, align)
        self._split_state: dict[str, Any] | None = None
        self._student_features: list[Tap] = []
        self._teacher_features: list[Tap] = []
        self._head_tap: Tap | None = None
        self._heads: tuple[OutputHead, OutputHead] | None = None
        self._had_grad: list[nn.Parameter] = []
        self._fingerprint: str | None = None
        self._trainer: Trainer | None = None
        self._device = torch.device("cpu")
        self._first = True

    def _make_teacher(self, teacher: Any, options: dict[str, Any] | None) -> nn.Module | None:
        return named_teacher(teacher, options, self.where)

    @property
    def loss_module(self) -> nn.Module:
        """The loss of logits, or of features where there is none."""
        return self.loss if self.loss is not None else self.feature_loss  # type: ignore[return-value]

    def networks(self) -> list[nn.Module]:
        """The teacher."""
        return [] if self.teacher is None else [self.teacher]

    def extras(self) -> nn.ModuleList:
        """What the losses train."""
        return nn.ModuleList([self.trained])

    def feature_taps(self, root: nn.Module) -> list[Tap]:
        """Taps on the student's features and, for a second head, on the input of its classifier."""
        self._student_features = [Tap(root, path, self.where) for path in self.layers]
        found = list(self._student_features)
        if isinstance(self.loss, DHKD):
            self._head_tap = Tap(root, INPUT + classifier_path(root, self.where), self.where)
            found.append(self._head_tap)
        if self.fused:
            ours, theirs = output_head(root), output_head(self.teacher)  # type: ignore[arg-type]
            if ours.layer.out_features != theirs.layer.out_features:
                raise LossplugError(
                    f"the student ({type(ours.model).__name__}) has vocab_size {ours.layer.out_features}, the teacher "
                    f"({type(theirs.model).__name__}) {theirs.layer.out_features}",
                    where=self.where,
                    remedy="Both need the same vocabulary (the length of a tokenizer is another number)",
                )
            self._heads = ours, theirs
            self._head_tap = Tap(root, INPUT + ours.path, self.where)
            found.append(self._head_tap)
        return found

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freezes and places the teacher, and hooks its features."""
        assert self.teacher is not None
        super().on_fit_start(trainer, pl_module)
        self._had_grad = freeze(self.teacher)
        self._trainer, self._device = trainer, pl_module.device
        self._check_fingerprint()
        taps = [Tap(self.teacher, path, self.where, with_grad_only=False) for path in self.layers.values()]
        self._teacher_features = taps
        if self.feature_loss is not None:
            self.feature_loss.to(pl_module.device)
        if self._split is not None:
            self._split.start(trainer, pl_module)
            if self._split_state is not None:
                self._split.load_state_dict(self._split_state)
                self._split_state = None
        self._first = True

    def on_term(self, trainer: Trainer, term: Tensor) -> None:
        """Takes the distillation's own gradient, where it is asked for."""
        if self._split is not None:
            self._split.take(term, trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Steps what the losses train, and gives the module's optimizer its gradients."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._split is not None:
            self._split.act(trainer)

    def after_step(self) -> None:
        """Gives the optimizer its settings back."""
        if self._split is not None:
            self._split.after_step()

    def _check_fingerprint(self) -> None:
        assert self.teacher is not None
        now = fingerprint(self.teacher)
        if self._fingerprint is not None and self._fingerprint != now:
            raise LossplugError(
                f"the run was started with the teacher {self._fingerprint}, this one is {now}",
                where=self.where,
                remedy="Resume with the teacher the run was started with",
            )
        self._fingerprint = now

    def _ask(self) -> Any:
        """Returns what the teacher says about the student's input."""
        assert self.teacher is not None
        args, kwargs = self.teacher_call()
        if hasattr(self.teacher, "config"):
            kwargs.pop("labels", None)  # a transformers model would compute a loss nobody reads
        if self.teacher.training:
            to_eval(self.teacher)
        # Not inference_mode: its tensors can't be saved for the backward pass of the loss.
        network: Any = self.teacher
        if self._heads is not None:
            network = self._heads[1].model.base_model  # up to the hidden states, without the logits
        with torch.no_grad(), all_armed(self._teacher_features):
            return network(*args, **kwargs)

    def term(self, trainer: Trainer, pl_module: LightningModule, call: Call, batch: Any) -> Tensor:
        """The weighted losses of logits and features."""
        answer = self._ask()
        parts: list[Tensor] = []
        self.logs = {}
        if self.loss is not None:
            weight = self.value(self.weight, trainer)
            value = self._fused_loss(call, answer, batch) if self.fused else self._logit_loss(call, answer, batch)
            parts.append(weight * value)
            self.logs |= {"kd": value.detach(), "weight": torch.tensor(weight)}
        if self.feature_loss is not None:
            ours = [_tensor(tap) for tap in self._student_features]
            theirs = [_tensor(tap) for tap in self._teacher_features]
            for tap in self._teacher_features:
                tap.forget()
            self._build("features", lambda: self._build_features(ours, theirs))
            weight = self.value(self.feature_weight, trainer)
            value = self.feature_loss(ours, theirs)
            parts.append(weight * value)
            self.logs |= {"features": value.detach(), "feature_weight": torch.tensor(weight)}
        self._first = False
        return torch.stack(parts).sum()

    _must_be_trained = True  # a frozen teacher that says the same of every sample was not loaded

    def _fused_loss(self, call: Call, answer: Any, batch: Any) -> Tensor:
        assert self.loss is not None
        assert self._heads is not None
        assert self._head_tap is not None
        hidden, target = _tensor(self._head_tap), targets_of(batch, call.kwargs, self.targets)
        attention = call.kwargs.get("attention_mask")
        found = align(hidden, [answer.last_hidden_state], target, attention, self._shifts, True)
        mask = found.mask
        if found.target is not None and found.target.shape == found.student.shape[:-1]:
            valid = found.target != -100
            mask = valid if mask is None else mask & valid
        return fused_loss(self.loss, found.student, found.teachers[0], *self._heads, mask)

    def _logit_loss(self, call: Call, answer: Any, batch: Any) -> Tensor:
        assert self.loss is not None
        name = f"the teacher {type(self.teacher).__name__}"
        z_t = logits_of(answer, self.output, name)
        if self._first or z_t.device.type == "cpu":
            check_teacher_logits(z_t, name, frozen=self._first and self._must_be_trained)
        classes_last = getattr(self.loss, "reduction", "") != "pixelmean"
        found = self.signals(call, [z_t], batch, classes_last)
        z_s, (z_t,) = found.student, found.teachers
        if isinstance(self.loss, DHKD):
            assert self._head_tap is not None
            feature = _tensor(self._head_tap)
            if found.tokens and self._shifts:
                feature = feature[:, :-1]
            self._build("head", lambda: self._build_head(feature, z_s.shape[-1]))
            z_s = self.trained["head"](feature)
        target = found.target
        if found.tokens and target is not None and (target.shape != z_s.shape[:-1] and classes_last):
            target = None
        index = target if self.loss.needs_target or found.tokens else None
        mask = found.mask
        if self.any_vocabulary and index is not None:
            mask = index != -100 if mask is None else mask & (index != -100)
        return self.loss(z_s, z_t, index, mask=mask)

    # --- what the losses train, made when the shapes are known ---

    def _build(self, name: str, make: Callable[[], nn.Module | None]) -> None:
        if name in self.trained:
            return
        with torch.random.fork_rng(devices=[]):  # the run draws the same numbers whether it builds (resumed) or not
            made = make()
        self.trained[name] = nn.Identity() if made is None else made.to(self._device)
        pending = (self.loss is not None and isinstance(self.loss, DHKD) and "head" not in self.trained) or (
            self.feature_loss is not None and "features" not in self.trained
        )
        if not pending and any(True for _ in self.trained.parameters()):
            assert self._trainer is not None
            self._prepare(self._trainer)

    def _build_features(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> nn.Module | None:
        build = getattr(self.feature_loss, "build", None)
        if build is None:
            return None
        build(list(ours), list(theirs))
        return self.feature_loss

    def _build_head(self, feature: Tensor, classes: int) -> nn.Module:
        assert isinstance(self.loss, DHKD)
        return auxiliary_head(self.loss.head_kind, feature.shape[-1], classes)

    # --- checkpoint and end ---

    def state_dict(self) -> dict[str, Any]:
        """Also which teacher it was, and the velocities of ``dot_delta``."""
        split = {} if self._split is None else {"split": self._split.state_dict()}
        return {**super().state_dict(), "fingerprint": self._fingerprint, **split}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps :meth:`state_dict` until the objects exist."""
        super().load_state_dict(state_dict)
        self._fingerprint = state_dict["fingerprint"]
        self._split_state = state_dict.get("split")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hooks the student and wraps the training step of a fit."""
        if stage == "fit":
            self._fingerprint, self._first, self._split_state = None, True, None
        super().setup(trainer, pl_module, stage)

    def _detach(self, pl_module: LightningModule) -> None:
        super()._detach(pl_module)
        if self._split is not None:
            self._split.after_step()
        for tap in self._teacher_features:
            tap.remove()
        for p in self._had_grad:
            p.requires_grad_(True)
        self._student_features, self._teacher_features, self._had_grad = [], [], []
        self._head_tap, self._heads, self._trainer = None, None, None


def classifier_path(network: nn.Module, where: str) -> str:
    """Returns the path of a network's classifier: timm's ``get_classifier``, else its last linear layer.

    Raises:
        LossplugError: It has none.
    """
    getter = getattr(network, "get_classifier", None)
    if callable(getter):
        head = getter()
        path = next((name for name, m in network.named_modules() if m is head), None)
        if path and isinstance(head, nn.Linear):
            return path
    linear = [name for name, m in network.named_modules() if isinstance(m, nn.Linear) and name]
    if not linear:
        raise LossplugError(f"{type(network).__name__} has no linear classifier", where=where)
    return linear[-1]


def _tensor(tap: Tap) -> Tensor:
    value = tap.last().output
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(value, Tensor):
        raise LossplugError(f"{tap.path!r} gave {type(value).__name__}, expected a tensor", where=tap.where)
    return value


def _facts(loss: nn.Module) -> dict[str, Any]:
    entry = next((e for e in registry if e.kind == "loss" and e.factory is type(loss)), None)
    return entry.facts if entry else {}
