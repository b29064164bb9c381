"""Teachers that are frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_lossplug.callbacks.distillation_base import (
    Pick,
    Scheduled,
    named_teacher,
    weight_of,
)
from lightning_lossplug.callbacks.distillation_reading import classifier_path, facts, tensor_of
from lightning_lossplug.callbacks.distillation_steps import Normalize, StepwiseDistillation
from lightning_lossplug.distillation import (
    CRD,
    DHKD,
    CachedTeacher,
    DistillationLoss,
    FeatureLoss,
    LearnedLayers,
    OnlineLoss,
    StoredTop,
    TopKLogits,
    create,
)
from lightning_lossplug.distillation.dhkd import auxiliary_head
from lightning_lossplug.distillation.large_vocabulary import OutputHead, fused_loss, fused_options, output_head
from lightning_lossplug.distillation.layer_pairs import Layers, Pairing
from lightning_lossplug.distillation.networks import fingerprint, freeze, to_eval
from lightning_lossplug.distillation.on_policy import OnPolicy
from lightning_lossplug.distillation.sample_ids import content_ids, main_input
from lightning_lossplug.distillation.signals import align, check_not_nan, check_teacher_logits, logits_of, targets_of
from lightning_lossplug.distillation.taps import INPUT, Call, Tap, all_armed
from lightning_lossplug.distillation.two_gradients import AlignScope
from lightning_lossplug.errors import LossplugError


class Distillation(StepwiseDistillation):
    """Adds a distillation term from a frozen teacher to an unedited module.

    The teacher is called with what the student's network was called with (the same augmented images), without
    gradients, in eval mode, under the module's precision. It stays outside the module: checkpoint keys, optimizer and
    ``train()`` don't see it, and it is not saved; its fingerprint is, so that resuming with another one is an error.
    Features are read by path on both sides. What a loss trains itself (regressors of ``fitnet``, the second head of
    ``dhkd``) has an optimizer like the module's, stepping with it, and is in the checkpoint under the callback.

    Args:
        teacher: A network, or ``timm:NAME``, ``hf:NAME``, ``checkpoint:FILE``, ``artifact:FOLDER``, or the answers of
            one that was run before, ``cache:FOLDER`` (``lossplug cache-teacher``).
        loss: Name of a loss of logits, or an object; null for features only.
        parameters: Parameters of a loss given by name.
        teacher_kwargs: Arguments for a teacher given by name.
        weight: Factor of the loss: a number, a schedule, or ``{fraction of the run: value}``.
        temperature: Moves the loss's temperature; None: as in ``parameters``.
        ce_weight: Factor of the module's own loss. The usual benchmarks have 0.1 beside 0.9 for ``kd``.
        feature_loss: Name of a loss of features, or an object.
        feature_parameters: Its parameters, if given by name.
        feature_weight: Factor of the loss of features; benchmarks: ``fitnet`` 100, ``at`` 1000, ``rkd`` 1.
        layers: Path in the student's network -> path in the teacher, ``input:PATH`` for what a layer gets; or a number:
            so many blocks at equal depths, for networks with one stack of blocks, as transformers are; or ``learned``:
            every block of the student learns which of the teacher's to follow, with ``feature_loss``
            ``learned_layers`` or around the given one; or a path -> several paths in the teacher to choose from.
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
        normalize: ``batch``: the loss is the mean over the tokens of each batch of each process, so that a window of
            accumulated batches is a mean of means; ``window``: over all tokens of the window and all processes,
            exactly. That takes one more backward pass where batches are accumulated.
        on_policy: For language models: the share of steps in which the student learns from completions it samples
            itself, or an :class:`~lightning_lossplug.distillation.OnPolicy` with all settings. In those steps the
            module's own loss doesn't count. Batches have ``input_ids``, and ``labels`` of -100 on the prompts.
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
        layers: Layers = None,
        student: str | None = None,
        inputs_from: str | None = None,
        output: Pick = None,
        targets: Pick = None,
        shift: bool | None = None,
        fused: bool = False,
        lr_scale: float = 1.0,
        dot_delta: float | None = None,
        align: AlignScope | None = None,
        normalize: Normalize = "batch",
        on_policy: float | OnPolicy | None = None,
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
        self.pairing = Pairing(layers, self.where)
        if self.pairing.learned and feature_loss is not None and not isinstance(feature_loss, LearnedLayers):
            feature_loss = LearnedLayers(feature_loss)
        self.feature_loss = feature_loss
        self.feature_weight = weight_of(feature_weight, self.where, "feature_weight")
        if self.loss is None and feature_loss is None:
            raise LossplugError("neither loss nor feature_loss is given", where=self.where)
        if (feature_loss is not None) != bool(layers):
            raise LossplugError("feature_loss and layers go together", where=self.where)
        if isinstance(feature_loss, LearnedLayers) and not self.pairing.learned:
            raise LossplugError(
                "learned_layers has nothing to choose from", where=self.where, remedy="Say layers='learned'"
            )
        if self.temperature is not None and not hasattr(self.loss, "temperature"):
            raise LossplugError(f"{loss!r} has no temperature", where=self.where)
        self.fused = fused
        if fused:
            fused_options(self.loss)
        self.any_vocabulary = bool(self.loss is not None and facts(self.loss).get("any_vocabulary"))
        self.teacher: nn.Module | None = self._make_teacher(teacher, teacher_kwargs)
        if isinstance(self.teacher, CachedTeacher):
            self._check_cache(self.teacher, agreement)
        elif isinstance(self.loss, TopKLogits):
            raise LossplugError(
                "topk_logits is for a cache of the k largest log-probabilities",
                where=self.where,
                remedy="Give teacher='cache:FOLDER', made with lossplug cache-teacher --top-k, or another loss",
            )
        self.trained = nn.ModuleDict()
        self.set_steps(dot_delta, align, normalize, on_policy, feature_loss is None and self.loss is not None)
        if self.sampler is not None and isinstance(self.teacher, CachedTeacher):
            raise LossplugError("on_policy needs a teacher that runs, not its stored logits", where=self.where)
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

    def _check_cache(self, cache: CachedTeacher, agreement: bool) -> None:
        asked = {"feature_loss": self.feature_loss is not None, "fused": self.fused, "agreement": agreement}
        for name, given in asked.items():
            if given:
                raise LossplugError(
                    f"{name} needs a teacher that runs, not its stored logits", where=self.where, remedy="Leave it out"
                )
        if (cache.k is not None) != isinstance(self.loss, TopKLogits):
            what = "all logits" if cache.k is None else f"the {cache.k} largest of {cache.classes} log-probabilities"
            remedy = (
                "Use another loss" if cache.k is None else "Use loss='topk_logits', or make a cache without --top-k"
            )
            raise LossplugError(f"{cache.folder} holds {what}", where=self.where, remedy=remedy)

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
        if not self.pairing.named and self.feature_loss is not None:
            assert self.teacher is not None
            self.pairing.find(root, self.teacher)
        self._student_features = [Tap(root, path, self.where) for path in self.pairing.student]
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
        taps = [Tap(self.teacher, path, self.where, with_grad_only=False) for path in self.pairing.teacher]
        self._teacher_features = taps
        if self.feature_loss is not None:
            self.feature_loss.to(pl_module.device)
            read = getattr(self.feature_loss, "read_teacher", None)
            if read is not None:
                read([tap.module for tap in taps])
        self.start_steps(trainer, pl_module)
        self._first = True

    def _check_fingerprint(self) -> None:
        assert self.teacher is not None
        now = self.teacher.fingerprint if isinstance(self.teacher, CachedTeacher) else fingerprint(self.teacher)
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
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher(*args, sample_ids=self._sample_ids, **kwargs)
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
            value = self.normalized(value, trainer)
            parts.append(weight * value)
            self.logs |= {"kd": value.detach(), "weight": torch.tensor(weight)}
        if self.feature_loss is not None:
            ours = [tensor_of(tap) for tap in self._student_features]
            theirs = [tensor_of(tap) for tap in self._teacher_features]
            for tap, feature in zip(self._teacher_features, theirs, strict=True):
                tap.forget()
                if self._first:
                    check_not_nan(feature, f"the features {tap.path!r} of the teacher {type(self.teacher).__name__}")
            self._build("features", lambda: self._build_features(ours, theirs))
            weight = self.value(self.feature_weight, trainer)
            options = {}
            if isinstance(self.feature_loss, CRD):
                options["index"] = self.feature_loss.places(self._ids())
            value = self.feature_loss(ours, theirs, **options)
            parts.append(weight * value)
            self.logs |= {"features": value.detach(), "feature_weight": torch.tensor(weight)}
            if isinstance(self.feature_loss, LearnedLayers):
                self.logs |= self.feature_loss.logs(self.pairing.student)
        self._first = False
        return torch.stack(parts).sum()

    def _ids(self) -> Tensor:
        """Returns the ids of the batch's samples: the data set's, or hashes of what they hold."""
        return content_ids(*main_input(*self.teacher_call())) if self._sample_ids is None else self._sample_ids

    _must_be_trained = True  # a frozen teacher that says the same of every sample was not loaded

    def _fused_loss(self, call: Call, answer: Any, batch: Any) -> Tensor:
        assert self.loss is not None
        assert self._heads is not None
        assert self._head_tap is not None
        hidden, target = tensor_of(self._head_tap), targets_of(batch, call.kwargs, self.targets)
        attention = call.kwargs.get("attention_mask")
        if self._first:
            check_not_nan(answer.last_hidden_state, f"the hidden states of the teacher {type(self.teacher).__name__}")
            check_not_nan(self._heads[1].layer.weight, f"the output embeddings of {type(self.teacher).__name__}")
        found = align(hidden, [answer.last_hidden_state], target, attention, self._shifts, True)
        mask = found.mask
        if found.target is not None and found.target.shape == found.student.shape[:-1]:
            valid = found.target != -100
            mask = valid if mask is None else mask & valid
        self.count(found.student, mask, None)
        return fused_loss(self.loss, found.student, found.teachers[0], *self._heads, mask)

    def _stored_loss(self, call: Call, answer: StoredTop, batch: Any) -> Tensor:
        assert isinstance(self.loss, TopKLogits)
        assert isinstance(self.teacher, CachedTeacher)
        z = logits_of(call.output, self.output, "the student")
        if z.shape[-1] != self.teacher.classes:
            raise LossplugError(
                f"the student ({type(self.student_network).__name__}) has {z.shape[-1]} outputs, the teacher of the "
                f"cache ({self.teacher.manifest['teacher'].split()[0]}) {self.teacher.classes}",
                where=self.where,
                remedy="Both need the same classes or vocab_size (which is not the length of the tokenizer)",
            )
        target, attention = targets_of(batch, call.kwargs, self.targets), call.kwargs.get("attention_mask")
        found = align(z, list(answer), target, attention, self._shifts, True)
        target = found.target if found.tokens else None
        if target is not None and target.shape != found.student.shape[:-1]:
            target = None
        self.count(found.student, found.mask, target)
        ids, log_probs, rest = found.teachers
        return self.loss(found.student, ids, log_probs, target, rest=rest, mask=found.mask)

    def _logit_loss(self, call: Call, answer: Any, batch: Any) -> Tensor:
        assert self.loss is not None
        if isinstance(answer, StoredTop):
            return self._stored_loss(call, answer, batch)
        name = f"the teacher {type(self.teacher).__name__}"
        z_t = logits_of(answer, self.output, name)
        if self._first or z_t.device.type == "cpu":
            check_teacher_logits(z_t, name, frozen=self._first and self._must_be_trained)
        classes_last = getattr(self.loss, "reduction", "") != "pixelmean"
        found = self.signals(call, [z_t], batch, classes_last)
        self.tell("train", found)
        z_s, (z_t,) = found.student, found.teachers
        if isinstance(self.loss, DHKD):
            assert self._head_tap is not None
            feature = tensor_of(self._head_tap)
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
        self.count(z_s, mask, index)
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
        if isinstance(self.feature_loss, LearnedLayers):
            self.feature_loss.start(self.pairing.prior(self.feature_loss.spread))
        build(list(ours), list(theirs))
        return self.feature_loss

    def _build_head(self, feature: Tensor, classes: int) -> nn.Module:
        assert isinstance(self.loss, DHKD)
        return auxiliary_head(self.loss.head_kind, feature.shape[-1], classes)

    # --- checkpoint and end ---

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints which layers were learned to teach which."""
        if isinstance(self.feature_loss, LearnedLayers) and "features" in self.trained:
            self.say("layers of the student <- of the teacher\n" + self.layer_table())

    def layer_table(self) -> str:
        """Returns which layers of the teacher the student's layers have learned to follow, with weights.

        Raises:
            LossplugError: Layers are not learned, or there was no step yet.
        """
        if not isinstance(self.feature_loss, LearnedLayers):
            raise LossplugError("the layers are given, not learned", where=self.where, remedy="Say layers='learned'")
        return self.feature_loss.table(self.pairing.student, self.pairing.teacher)

    def state_dict(self) -> dict[str, Any]:
        """Also which teacher it was."""
        return {**super().state_dict(), "fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps :meth:`state_dict` until the objects exist."""
        super().load_state_dict(state_dict)
        self._fingerprint = state_dict["fingerprint"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hooks the student and wraps the training step of a fit."""
        if stage == "fit":
            self._fingerprint, self._first = None, True
        super().setup(trainer, pl_module, stage)

    def _detach(self, pl_module: LightningModule) -> None:
        super()._detach(pl_module)
        for tap in self._teacher_features:
            tap.remove()
        for p in self._had_grad:
            p.requires_grad_(True)
        self._student_features, self._teacher_features, self._had_grad = [], [], []
        self._head_tap, self._heads, self._trainer = None, None, None
